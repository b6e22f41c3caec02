"""A driver: posts events with known ids, then asks the tables what became of each.

Many connections post single events, arrays and NDJSON, over several lanes, with and without an
`Idempotency-Key`. What has a key is sent again until it is answered, and some of it once more after
that: it must count once. What has none is never sent again, unless no connection came about. Some
wait for their load.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import ssl
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.databases import dead_ids, execute, has
from tests.service import Service, until

LANES = ("crash_report", "purchase", "install")
# what COPY must escape, and what JSON must
TEXT = "{}\t\\ é\r\n\\N \\."
_REFUSED_S = 0.1
_TEXT_COLUMN = {"crash_report": "message", "purchase": "sku"}


@dataclass(slots=True)
class Post:
    """One body, and what was answered to it."""

    events: list[tuple[str, int]]  # lane and id
    body: bytes
    key: str | None
    answered: int = 0  # how often with 200 or 202
    refused: bool = False
    tries: int = 0
    waits: bool = False  # for its load
    dead: int | None = None  # dead letters, as its first answer said if it was loaded by then


@dataclass(slots=True)
class Verdict:
    """What became of the events: counts, and ids of those that broke the promise."""

    answered: int = 0  # each answer of 200 counts its events
    unanswered_stored: int = 0
    rows: int = 0
    distinct: int = 0
    dead: int = 0
    waiting: int = 0
    duplicates_by_key: int = 0
    lost: list[int] = field(default_factory=list)
    doubled: list[int] = field(default_factory=list)
    refused_stored: list[int] = field(default_factory=list)
    wrongly_dead: list[int] = field(default_factory=list)  # or in the table, which refuses it
    damaged: int = 0
    miscounted: list[int] = field(default_factory=list)  # POSTs with other dead letters than said

    def check(self) -> None:
        """Every event answered 200 is in once, whole, and the sum comes out."""
        assert not self.lost, f"{len(self.lost)} lost: {self.lost[:10]}"
        assert not self.doubled, f"{len(self.doubled)} doubled: {self.doubled[:10]}"
        assert not self.refused_stored, f"refused, yet stored: {self.refused_stored[:10]}"
        assert not self.wrongly_dead, f"{len(self.wrongly_dead)} wrongly: {self.wrongly_dead[:10]}"
        assert not self.damaged, f"{self.damaged} rows are not what was sent"
        assert not self.miscounted, f"not so many dead letters: {self.miscounted[:10]}"
        came = self.answered + self.unanswered_stored
        went = self.rows + self.dead + self.waiting + self.duplicates_by_key
        assert came == went, self


class Driver:
    """Posts to whatever `url` gives at the moment; nothing while that is empty.

    Args:
        certain: what is answered 503 at the first try is stored nowhere.
        refuses: whether the table of a lane refuses this id.
        waits: share of POSTs that wait for their load, for 2 s at the most.
    Attributes:
        faults: answers that no test expects. torn: answers that broke off.
        statuses: of all answers.
    """

    def __init__(
        self,
        url: Callable[[], str],
        seed: int,
        *,
        lanes: tuple[str, ...] = LANES,
        connections: int = 16,
        batch: int = 60,
        pause_s: float = 0.02,
        tls: ssl.SSLContext | bool = True,
        certain: bool = True,
        refuses: Callable[[str, int], bool] = lambda lane, id: False,
        waits: float = 0.0,
    ) -> None:
        self.posts: list[Post] = []
        self.faults: list[str] = []
        self.statuses: Counter[int] = Counter()
        self.torn = 0
        self._certain = certain
        self._refuses = refuses
        self._waits = waits
        self._url = url
        self._random = random.Random(seed)
        self._lanes = lanes
        self._connections = connections
        self._batch = batch
        self._pause_s = pause_s
        self._tls = tls
        self._ids = itertools.count(1)
        self._again: deque[Post] = deque()
        self._stopping = False
        self._run = f"{self._random.getrandbits(64):016x}"
        self.answers = 0

    # --- posting ---

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Driver]:
        """Post in the background; on the way out requests under way end as they will."""
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            self._stopping = False
            work = [asyncio.create_task(self._work(session)) for _ in range(self._connections)]
            try:
                yield self
            finally:
                self._stopping = True
                await asyncio.gather(*work)

    async def settle(self, timeout_s: float = 30.0) -> None:
        """Send what has a key and no answer until it has one."""
        async with asyncio.timeout(timeout_s), aiohttp.ClientSession() as session:
            while self._again:
                await self._send(session, self._again.popleft())

    async def one(self, lane: str) -> float:
        """Send one event, under a key, until it is answered 200; how long that took, in seconds."""
        id = next(self._ids)
        post = Post([(lane, id)], json.dumps(event(lane, id)).encode(), f"{self._run}-{id}")
        self.posts.append(post)
        began = time.monotonic()
        async with aiohttp.ClientSession() as session:
            while not post.answered:
                if self._url():
                    await self._send(session, post, again=False)
                await asyncio.sleep(0 if post.answered else 0.05)
        return time.monotonic() - began

    async def answered(self, more: int, timeout_s: float = 30.0) -> None:
        """Wait for so many more answers of 200."""
        goal = self.answers + more

        async def there() -> bool:
            return self.answers >= goal

        await until(there, timeout_s, f"{more} more answers")

    async def _work(self, session: aiohttp.ClientSession) -> None:
        while not self._stopping:
            pause_s = self._pause_s
            if self._url():
                post = self._next()
                answered = post.answered
                await self._send(session, post)
                if post.answered == answered:  # a client that is refused is patient
                    pause_s = max(pause_s, _REFUSED_S)
            await asyncio.sleep(self._random.uniform(0, 2 * pause_s))

    def _next(self) -> Post:
        if self._again:
            return self._again.popleft()
        if self.posts and self._random.random() < 0.05:
            old = self._random.choice(self.posts)
            if old.key and old.answered:
                return old  # a client that did not see its answer
        post = self._make()
        self.posts.append(post)
        return post

    def _make(self) -> Post:
        shape = self._random.choice(["one", "one", "array", "lines"])
        count = 1 if shape == "one" else self._random.randint(1, self._batch)
        events = [(self._random.choice(self._lanes), next(self._ids)) for _ in range(count)]
        objects = [json.dumps(event(lane, id)) for lane, id in events]
        body = f"[{','.join(objects)}]" if shape == "array" else "\n".join(objects)
        key = f"{self._run}-{events[0][1]}" if self._random.random() < 0.5 else None
        return Post(events, body.encode(), key, waits=self._random.random() < self._waits)

    async def _send(self, session: aiohttp.ClientSession, post: Post, again: bool = True) -> None:
        """Args: again: what is to be sent again comes into the queue."""
        headers = {"Idempotency-Key": post.key} if post.key else {}
        if post.waits:
            headers["Prefer"] = "wait=2"
        answer: dict[str, Any] = {}
        try:
            async with session.post(
                f"{self._url()}/", data=post.body, headers=headers, ssl=self._tls
            ) as response:
                answer = await response.json()
        except (aiohttp.ClientConnectorError, aiohttp.InvalidURL):
            if again:  # nothing was sent
                self._again.append(post)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as exc:
            self.torn += isinstance(exc, aiohttp.ClientPayloadError | ValueError)
            self._unanswered(post, again)
        else:
            self._book(post, response.status, answer, again)

    def _unanswered(self, post: Post, again: bool) -> None:
        post.tries += 1
        if post.key and not post.answered and again:
            self._again.append(post)

    def _book(self, post: Post, status: int, answer: dict[str, Any], again: bool) -> None:
        post.tries += 1
        self.statuses[status] += 1
        if status == 200 or (status == 202 and post.waits):
            post.answered += 1
            self.answers += 1
            if post.tries == 1:
                post.dead = answer.get("dead")
            if answer.get("accepted", 1) != len(post.events) and post.body.startswith(b"["):
                self.faults.append(f"{len(post.events)} sent: {answer}")
        elif status == 503:
            post.refused = post.tries == 1 and post.key is None and self._certain
            if post.key and not post.answered and again:
                self._again.append(post)
        elif status == 207 and answer.get("busy"):
            self._part(post, {error["index"] for error in answer["errors"]})
        else:
            self.faults.append(f"{status}: {answer}")

    def _part(self, post: Post, refused: set[int]) -> None:
        """Some lanes are full: these events of it were not taken."""
        others = [each for index, each in enumerate(post.events) if index in refused]
        # an earlier try, answered by nothing or 503, may have stored them, or a later one may
        certain = post.tries == 1 and post.key is None
        self.posts.append(Post(others, b"", None, refused=certain, tries=1))
        post.events = [each for index, each in enumerate(post.events) if index not in refused]
        post.answered += 1
        self.answers += 1

    # --- what became of it ---

    async def compare(self, database: str, waiting: int = 0) -> Verdict:
        """Look into the tables and the dead letters.

        Args: waiting: events that the services say still wait.
        """
        assert not self.faults, self.faults[:5]
        return await asyncio.to_thread(self._compare, database, waiting)

    def _compare(self, database: str, waiting: int) -> Verdict:
        rows, damaged = read_tables(database, self._lanes)
        dead = dead_ids(database)
        verdict = Verdict(
            rows=rows.total(), distinct=len(rows), dead=dead.total(), waiting=waiting,
            damaged=damaged,
        )  # fmt: skip
        for post in self.posts:
            verdict.answered += post.answered * len(post.events)
            verdict.duplicates_by_key += max(0, post.answered - 1) * len(post.events)
            if post.dead not in (None, sum(dead[each] for each in post.events)):
                verdict.miscounted.append(post.events[0][1])
            for each in post.events:
                self._judge(verdict, post, each[1], rows[each] + dead[each])
                if rows[each] if self._refuses(*each) else dead[each]:
                    verdict.wrongly_dead.append(each[1])
        return verdict

    @staticmethod
    def _judge(verdict: Verdict, post: Post, id: int, times: int) -> None:
        if times > 1:
            verdict.doubled.append(id)
        if post.answered and not times:
            verdict.lost.append(id)
        if not post.answered:
            verdict.unanswered_stored += times
            if times and post.refused:
                verdict.refused_stored.append(id)

    async def check(self, database: str, waiting: int = 0) -> Verdict:
        """Compare; AssertionError if an event is lost, doubled or damaged."""
        verdict = await self.compare(database, waiting)
        verdict.check()
        assert verdict.answered > 0, "nothing was answered: the test tests nothing"
        return verdict


def event(lane: str, id: int) -> dict[str, Any]:
    """The event of this id; its content follows from the id."""
    made = {"event_name": lane, "user_id": id, "timestamp": 7 * id}
    if lane in _TEXT_COLUMN:
        made[_TEXT_COLUMN[lane]] = TEXT.format(id)
    return made


def read_tables(database: str, lanes: Iterable[str]) -> tuple[Counter[tuple[str, int]], int]:
    """How often each event is there, and how many rows are not what was sent."""
    found: Counter[tuple[str, int]] = Counter()
    damaged = 0
    for lane in lanes:
        if not has(database, lane):
            continue
        columns = ["user_id", "timestamp", *([_TEXT_COLUMN[lane]] if lane in _TEXT_COLUMN else [])]
        rows = execute(database, f"SELECT {', '.join(columns)} FROM {lane}")
        found.update((lane, id) for id, *_ in rows)
        for id, *rest in rows:
            sent = event(lane, id)
            damaged += rest != [sent[column] for column in columns[1:]]
    return found, damaged


async def fill(service: Service, seed: int, answers: int = 40) -> Driver:
    """Start the service and post to it until so many answers of 200 have come."""
    await service.start()
    driver = Driver(lambda: service.url, seed)
    async with driver.running():
        await driver.answered(answers)
    return driver
