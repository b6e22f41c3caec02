"""Services on IronMQ, in this process: its database in memory, its neighbours soon told dead."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from datapipe import logs
from datapipe.app import PIPELINE, Pipeline, create_app, create_runner
from datapipe.errors import ConfigError, MirrorUnavailable
from datapipe.events.segment import Segment
from datapipe.mirrors import check_mirror
from datapipe.mirrors.ironmq import mirror as ironmq
from datapipe.mirrors.ironmq.client import encode_post
from datapipe.mirrors.ironmq.mirror import open_ironmq
from datapipe.mirrors.ironmq.wire import pack
from datapipe.pipeline import coordinator as housekeeping
from datapipe.pipeline.watch import Watch
from datapipe.settings import Settings, load
from datapipe.sinks import Beat
from tests import commands
from tests.doubles.faults import What
from tests.doubles.ironmq import IronMQ
from tests.doubles.memory_database import MemoryDatabase
from tests.service import until

TOKEN = "t0ken/with+odd=characters"


class Running:
    """One service; `stop` is its orderly end, `kill` is none."""

    def __init__(self, pipeline: Pipeline, runner: web.AppRunner) -> None:
        self.pipeline = pipeline
        self._runner = runner
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    @property
    def status(self) -> dict[str, Any]:
        return self.pipeline.status.snapshot()

    @property
    def books(self) -> dict[str, Any]:
        books: dict[str, Any] = self.status["books"]
        return books

    async def post(self, *users: int, lane: str = "install", key: str | None = None) -> int:
        body = [{"event_name": lane, "user_id": user, "timestamp": 1, "sku": "s"} for user in users]
        headers = {"Idempotency-Key": key} if key else {}
        async with (
            aiohttp.ClientSession() as client,
            client.post(self.url, json=body, headers=headers) as response,
        ):
            await response.read()
            return response.status

    async def get(self, path: str) -> str:
        async with (
            aiohttp.ClientSession() as client,
            client.get(self.url + path) as response,
        ):
            return await response.text()

    async def kill(self) -> None:
        """It beats no more, loads no more, and says nothing."""
        self.pipeline._stopped = True
        await self._runner.cleanup()

    async def stop(self) -> None:
        await self.pipeline.stop()
        await self._runner.cleanup()

    async def comes_true(self, holds: Callable[[], bool], what: str = "it") -> None:
        async def there() -> bool:
            return holds()

        await until(there, 15, what)

    async def drained(self) -> None:
        await self.comes_true(lambda: self.books["waiting"] == 0, "an empty buffer")
        assert self.books["balanced"], self.books


class Town:
    """IronMQ, the database, and services on them."""

    def __init__(self, mq: IronMQ, stack: AsyncExitStack) -> None:
        self.mq = mq
        self.database = MemoryDatabase()
        self._stack = stack

    async def start(self, **more: Any) -> Running:
        settings = Settings(
            **{
                "host": "127.0.0.1", "mirror": "ironmq", "ironmq_host": self.mq.host,
                "ironmq_project_id": self.mq.project_id, "ironmq_token": self.mq.token,
                "mirror_timeout": 1, "load_interval": 0.05, "load_min_interval": 0, **more,
            }
        )  # fmt: skip
        app = create_app(settings, open_sink=self.database.open)
        runner = create_runner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        running = Running(app[PIPELINE], runner)
        self._stack.push_async_callback(runner.cleanup)
        return running

    def users(self, lane: str = "install") -> list[int]:
        return sorted(int(row.split(b"\t")[0]) for row in self.database.lines.get(lane, []))

    async def emptied(self) -> None:
        await self.mq.until(lambda: not sum(queue.size for queue in self.mq.queues.values()), 15)


@pytest.fixture
async def town(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Town]:
    monkeypatch.setattr(housekeeping, "BEAT_S", 0.05)
    monkeypatch.setattr(housekeeping, "SILENT_S", 0.6)
    monkeypatch.setattr(housekeeping, "_FIRST_PAUSE_S", 0.2)
    monkeypatch.setattr(ironmq, "RECOVER_INTERVAL_S", 0.5)
    async with IronMQ(token=TOKEN) as mq, AsyncExitStack() as stack:
        yield Town(mq, stack)


@pytest.fixture
def seldom(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks into IronMQ without a reason."""
    monkeypatch.setattr(housekeeping, "_FIRST_PAUSE_S", 300)
    monkeypatch.setattr(ironmq, "RECOVER_INTERVAL_S", 300)


# --- the way of an event ---


async def test_from_post_to_row_and_out_of_ironmq(town: Town, seldom: None) -> None:
    service = await town.start(load_interval=300)
    assert await service.post(1, 2, 3) == 200
    assert town.mq.queue("install").size == 1
    assert service.status["mirror"]["kind"] == "ironmq"
    await service.comes_true(lambda: bool(town.database.beats))
    await service.stop()
    assert town.users() == [1, 2, 3]
    assert town.mq.queue("install").size == 0
    assert town.mq.requests == {"list": 1, "put_queue": 1, "post": 1, "delete_many": 1}


async def test_an_answer_comes_after_ironmqs_and_not_before(town: Town) -> None:
    service = await town.start()
    town.mq.faults.next("late", call="post", seconds=0.3)
    posting = asyncio.create_task(service.post(1))
    await town.mq.until(lambda: town.mq.queue("install").size == 1)
    assert not posting.done()
    assert service.books["accepted"] == 0
    assert await posting == 200


async def test_many_posts_share_few_messages(town: Town) -> None:
    town.mq.latency = 0.05
    service = await town.start(load_interval=300)
    answers = await asyncio.gather(*(service.post(user) for user in range(200)))
    assert set(answers) == {200}
    assert town.mq.requests["post"] < 60


async def test_one_sick_queue_holds_up_no_other_lane(town: Town) -> None:
    service = await town.start()
    assert await service.post(1, lane="purchase") == 200
    town.mq.faults.next("late", 2, call="put_queue", seconds=0.8)
    slow = asyncio.create_task(service.post(2, lane="install"))
    await town.mq.until(lambda: town.mq.requests["put_queue"] == 2)
    assert await service.post(3, lane="purchase") == 200
    assert not slow.done()
    assert await slow == 200


async def test_the_oldest_message_tells_its_age(town: Town) -> None:
    service = await town.start(load_interval=300)
    await service.post(1)
    await service.comes_true(lambda: service.status["lanes"]["install"]["oldest_seconds"] > 0.1)
    assert 'datapipe_oldest_waiting_seconds{lane="install"} 0.' in await service.get("/metrics")
    metrics = await service.get("/metrics")
    told = re.search(r'^datapipe_mirror_requests_total\{call="post"\} (\d+)\.0$', metrics, re.M)
    assert told
    # more than one if an answer came late, and more than came there if one was given up before
    assert int(told[1]) >= town.mq.requests["post"] >= 1


async def test_the_oldest_tells_its_age_though_it_came_last(town: Town) -> None:
    """What a dead process left an hour ago is found behind newer events."""
    service = await town.start()
    town.database.loading = False
    assert await service.post(1) == 200
    columns = service.pipeline.registry.types["install"].columns
    left = Segment("install", columns, b"7\t1\t\n", 1, created_at=time.time() - 3600)
    town.mq.put("install", [pack(left, "dead", 0.0)])
    await service.comes_true(lambda: service.books["recovered"] == 1)
    assert 3600 <= service.status["lanes"]["install"]["oldest_seconds"] < 3660
    town.database.loading = True
    await service.drained()
    assert service.status["lanes"]["install"]["oldest_seconds"] == 0


# --- parking ---


async def test_parked_events_are_read_back_once_and_in_order(town: Town) -> None:
    service = await town.start(buffer_max_bytes=60_000)
    await service.comes_true(lambda: service.status["database"]["up"])
    town.database.up = False
    for user in range(0, 900, 3):
        assert await service.post(user, user + 1, user + 2) == 200
    lane = service.status["lanes"]["install"]
    assert lane["parked"] > 600
    assert service.pipeline.buffer.mirror.memory_bytes <= 60_000
    town.database.up = True
    await service.drained()
    assert town.users() == list(range(900))
    await town.emptied()
    assert town.mq.requests["get"] < 100
    rows = [int(row.split(b"\t")[0]) for row in town.database.lines["install"]]
    assert rows == sorted(rows)


async def test_parked_events_that_another_process_loaded_are_duplicates(town: Town) -> None:
    """And `POST /load` answers, though there was nothing to load."""
    service = await town.start(buffer_max_bytes=3000, load_interval=300)
    await service.comes_true(lambda: service.status["database"]["up"])
    town.database.up = False
    for user in range(10):
        assert await service.post(user, user + 100) == 200
    assert service.status["lanes"]["install"]["parked"]
    async with open_ironmq(service.pipeline.settings, "another") as other:
        taken = await other._store.client.reserve("install", 100, 60)
        for message in taken:
            town.database.knows(json.loads(message.body)["segment"])
        await other._store.client.delete("install", [(m.id, m.reservation_id) for m in taken])
    town.database.up = True
    async with asyncio.timeout(10):
        await service.pipeline.loader.load_now()
    await service.drained()
    assert (service.books["duplicate"], service.books["loaded"]) == (20, 0)


async def test_what_was_not_parked_is_not_read_back_with_its_neighbours(town: Town) -> None:
    """Nor is what was loaded and waits for its removal."""
    service = await town.start(buffer_max_bytes=20_000, mirror_timeout=5)
    town.database.loading = False
    for user in range(20):
        assert await service.post(user) == 200
    assert service.status["lanes"]["install"]["parked"]
    columns = service.pipeline.registry.types["install"].columns
    left = Segment("install", columns, b"99\t1\t2026-01-01\n", 1)
    town.mq.put("install", [pack(left, "dead", 0.0)])
    await service.comes_true(lambda: service.books["recovered"] == 1)
    for user in range(20, 30):
        assert await service.post(user) == 200
    town.mq.faults.rate("late", 1.0, call="delete_many", seconds=2)
    town.database.loading = True
    await service.drained()
    assert (service.books["loaded"], service.books["duplicate"]) == (31, 0)
    assert town.users() == [*range(30), 99]
    await town.emptied()


async def test_the_books_hold_while_parking_loading_and_removal_overlap(town: Town) -> None:
    """Removals that are late must not be read back; POSTs of many segments park out of turn."""
    town.mq.faults.rate("late", 0.5, call="delete_many", seconds=0.2)
    service = await town.start(buffer_max_bytes=40_000, load_trigger_bytes=2_000, load_workers=1)
    users = iter(range(100_000))
    for _ in range(4):
        town.database.up = not town.database.up
        posts = [[next(users) for _ in range(40)] for _ in range(25)]
        assert set(await asyncio.gather(*(service.post(*post) for post in posts))) == {200}
        assert service.books["balanced"], service.books
    town.database.up = True
    await service.drained()
    assert (service.books["loaded"], service.books["duplicate"]) == (4000, 0)
    assert town.users() == list(range(4000))
    await town.emptied()


async def test_ironmq_max_bytes_refuses_and_heals(town: Town) -> None:
    service = await town.start(ironmq_max_bytes=65_536, load_interval=300)
    town.database.up = False
    user = 0
    while (status := await service.post(*range(user, user + 500))) == 200:
        user += 500
    assert status == 503
    assert "ironmq_max_bytes" in await service.get("/readyz")
    assert service.status["mirror"]["up"]
    town.database.up = True
    await service.pipeline.loader.load_now()
    await service.drained()
    await town.emptied()
    await service.comes_true(lambda: service.pipeline.status.not_ready() is None)
    assert await service.post(user) == 200


async def test_a_blocked_lane_holds_up_no_recovery_of_others(town: Town) -> None:
    service = await town.start()
    town.database.blocked.add("install")
    assert await service.post(1) == 200
    await service.comes_true(lambda: service.status["lanes"]["install"]["blocked"] is not None)
    for lane in ("install", "purchase"):
        columns = service.pipeline.registry.types[lane].columns
        left = Segment(lane, columns, b"7\t1\n", 1)
        await service.pipeline.buffer.mirror._store.client.post(  # type: ignore[attr-defined]
            lane, encode_post(pack(left, "dead", 0.0))
        )
    await service.comes_true(lambda: town.users("purchase") == [7])
    assert service.status["lanes"]["install"]["recovered"] == 0
    town.database.blocked.clear()
    await service.pipeline.loader.load_now()
    await service.comes_true(lambda: town.users() == [1, 7])
    await town.emptied()


# --- processes ---


async def test_what_a_dead_process_left_is_loaded_by_another(town: Town, seldom: None) -> None:
    victim, heir = await town.start(load_interval=300), await town.start()
    await heir.comes_true(lambda: len(town.database.beats) == 2)
    assert await victim.post(1, 2) == 200
    await victim.kill()
    await heir.comes_true(lambda: town.users() == [1, 2])
    await heir.drained()
    assert heir.books["recovered"] == 2
    await town.emptied()


async def test_what_a_process_left_when_it_stopped_is_loaded_at_once(town: Town) -> None:
    service = await town.start()
    town.database.blocked.add("install")
    assert await service.post(1, 2) == 200
    await service.comes_true(lambda: service.status["lanes"]["install"]["blocked"] is not None)
    await service.stop()
    town.database.blocked.clear()
    assert town.mq.queue("install").size == 1
    heir = await town.start()
    started = asyncio.get_running_loop().time()
    await heir.comes_true(lambda: town.users() == [1, 2])
    assert asyncio.get_running_loop().time() - started < housekeeping.SILENT_S


async def test_the_living_do_not_fight(town: Town) -> None:
    one, two = await town.start(load_interval=300), await town.start(load_interval=300)
    for user in range(0, 20, 2):
        assert await one.post(user) == await two.post(user + 1) == 200
    beats = town.database.beats
    last = max(beat.count for beat in beats.values())
    await one.comes_true(lambda: all(beat.count > last + 30 for beat in beats.values()))
    assert town.mq.requests["peek"] > 4
    assert town.mq.requests["reserve"] == 0
    await one.stop()
    await two.stop()
    assert town.users() == list(range(20))
    assert (one.books["duplicate"], two.books["duplicate"]) == (0, 0)


async def test_one_taken_for_dead_that_lives_books_duplicates(town: Town) -> None:
    one = await town.start(load_interval=300)
    assert await one.post(1, 2) == 200
    two = await town.start()
    (beating,) = (task for task in asyncio.all_tasks() if _is_beat_of(task, one))
    beating.cancel()
    await two.comes_true(lambda: town.users() == [1, 2])
    await two.drained()
    await one.pipeline.loader.load_now()
    await one.drained()
    assert (one.books["duplicate"], two.books["loaded"]) == (2, 2)
    await town.emptied()


def _is_beat_of(task: asyncio.Task[Any], service: Running) -> bool:
    frame = getattr(task.get_coro(), "cr_frame", None)
    return bool(frame and frame.f_locals.get("step") == service.pipeline.coordinator._beat)


async def test_a_beat_does_not_wait_for_ironmq(town: Town) -> None:
    service = await town.start(mirror_timeout=30)
    await service.comes_true(lambda: bool(town.database.beats))
    await town.mq.leave("reset")
    await asyncio.sleep(0)
    count = max(beat.count for beat in town.database.beats.values())
    await service.comes_true(
        lambda: max(beat.count for beat in town.database.beats.values()) > count + 20
    )
    await town.mq.come_back()


async def test_a_post_given_up_on_yet_stored_is_loaded_soon(town: Town, seldom: None) -> None:
    service = await town.start(mirror_timeout=0.3)
    await service.comes_true(lambda: bool(town.database.beats))
    town.mq.faults.rate("503", 1.0, call="post", after=True)
    assert await service.post(1) == 503
    town.mq.faults.clear()
    await service.comes_true(lambda: town.users() == [1])
    await town.emptied()
    await service.drained()
    assert service.books["recovered"] - service.books["duplicate"] == 1


async def test_events_of_a_type_that_is_not_registered_wait_in_a_blocked_lane(town: Town) -> None:
    sender = await town.start(events={"signup": {"user_id": "int"}}, load_interval=300)
    assert await sender.post(5, lane="signup") == 200
    await sender.kill()
    service = await town.start()
    await service.comes_true(lambda: "signup" in service.status["lanes"])
    assert "no event type 'signup'" in service.status["lanes"]["signup"]["blocked"]
    assert town.mq.queue("signup").size == 1
    knows = await town.start(events={"signup": {"user_id": "int"}})
    await knows.comes_true(lambda: town.users("signup") == [5])
    await town.emptied()


# --- who is dead ---


def test_silence_is_told_only_while_the_database_was_watched() -> None:
    watch = Watch(30)
    beats = {"a": Beat(1, False), "b": Beat(1, False), "gone": Beat(9, True)}
    for now in range(100, 130, 5):
        watch.note({**beats, "b": Beat(now, False)}, now)
    assert not watch.is_dead("a")
    watch.lost_sight()  # an outage, in which somebody asks
    assert not watch.is_dead("a")
    assert not watch.is_dead("never heard of")
    assert watch.is_dead("gone")
    for now in range(900, 930, 5):  # all rows are old, and say nothing
        watch.note(beats, now)
        assert watch.dead() == {"gone"}
        assert not watch.is_dead("never heard of")
    watch.note(beats, 930)
    assert watch.dead() == {"a", "b", "gone", "never heard of"}
    assert watch.is_dead("never heard of")


def test_a_watch_that_was_stopped_itself_starts_anew() -> None:
    watch = Watch(30)
    for now in (100, 105, 110):
        watch.note({"a": Beat(1, False)}, now)
    watch.note({"a": Beat(1, False)}, 300)  # SIGSTOP, or a frozen machine: perhaps for both
    assert not watch.is_dead("a")


# --- settings, commands, secrets ---


async def command(town: Town, folder: Path, *words: str, **settings: Any) -> tuple[int, str]:
    """Run a datapipe command on this IronMQ: exit code and output."""
    file = folder / "datapipe.json"
    credentials = {"ironmq_token": TOKEN, "ironmq_project_id": town.mq.project_id}
    settings = {"ironmq_host": town.mq.host, "mirror_timeout": 1, **credentials, **settings}
    file.write_text(json.dumps(settings))
    return await commands.command(file, *words)


def test_auto_takes_ironmq_when_its_credentials_are_set() -> None:
    platform = {"IRON_MQ_PROJECT_ID": "p", "IRON_MQ_TOKEN": "t"}
    assert load(environ=platform).mirror_kind == "ironmq"
    assert load(environ={**platform, "DYNO": "web.1"}).mirror_kind == "ironmq"
    assert load(environ={"IRON_MQ_TOKEN": "t"}).mirror_kind == "journal"
    assert load(environ={**platform, "IRON_MQ_HOST": "http://mq:8080"}).ironmq_host.endswith("8080")
    with pytest.raises(ConfigError, match="IRON_MQ_PROJECT_ID"):
        load(environ={"DYNO": "web.1"})
    with pytest.raises(ConfigError, match="ironmq_token"):
        load(environ={"DATAPIPE_MIRROR": "ironmq", "IRON_MQ_PROJECT_ID": "p"})


@pytest.mark.parametrize("state", ["good", "bad token", "bad project", "away"])
async def test_the_check_command(town: Town, database: str, tmp_path: Path, state: str) -> None:
    town.mq.put("install", ["a", "b"])
    if state == "away":
        await town.mq.leave("closed")
    code, output = await command(
        town, tmp_path, "check", database_url=database,
        ironmq_token=TOKEN + "x" * (state == "bad token"),
        ironmq_project_id="0" * 24 if state == "bad project" else town.mq.project_id,
    )  # fmt: skip
    assert code == (0 if state == "good" else 1), output
    assert TOKEN not in output
    lines = [line for line in output.splitlines() if "ironmq" in line]
    if state == "good":
        assert lines[1].startswith("ok")
        assert "install: 2 messages" in lines[1]
    else:
        assert [line[:4] for line in lines] == ["fail"], output
    assert town.mq.queue("install").bodies == ["a", "b"]


async def test_the_token_is_nowhere(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("debug", "json")
    service = await town.start(mirror_timeout=0.3, buffer_max_bytes=3000)
    told: list[str] = []
    kinds: list[What] = ["408", "500", "503", "504", "reset", "cut", "slow", "late", "expire"]
    for what in kinds:
        town.mq.faults.rate(what, 1.0, seconds=1)
        told.append(str(await service.post(1)))
        told += [await service.get(path) for path in ("/", "/status.json", "/metrics", "/readyz")]
        town.mq.faults.clear()
    for change in ({"token": "another"}, {"project_id": "1" * 24}):
        before = {name: getattr(town.mq, name) for name in change}
        for name, value in change.items():
            setattr(town.mq, name, value)
        assert await service.post(1) == 503
        with suppress(MirrorUnavailable):
            await service.pipeline.coordinator._look()
        told += [await service.get(path) for path in ("/", "/status.json", "/readyz")]
        told += [text for _, text in await check_mirror(service.pipeline.settings)]
        for name, value in before.items():
            setattr(town.mq, name, value)
    assert "credentials" in "".join(told)
    mirror = service.pipeline.buffer.mirror
    told += [repr(each) for each in (service.pipeline.settings, mirror, mirror._store.client)]  # type: ignore[attr-defined]
    await service.stop()
    told.append("".join(capsys.readouterr()))
    assert "mirror down" in told[-1]
    assert not [text for text in told if TOKEN in text or TOKEN.split("/")[1] in text]


async def test_the_load_command_loads_what_a_dead_process_left(
    town: Town, database: str, tmp_path: Path
) -> None:
    service = await town.start(load_interval=300)
    columns = service.pipeline.registry.types["install"].columns
    row = b"%d\t1\t2026-01-01 00:00:00+00\n"
    left = [Segment("install", columns, row % user, 1) for user in range(250)]
    for at in range(0, 250, 50):
        town.mq.put("install", [pack(each, "dead", 0.0) for each in left[at : at + 50]])
    await service.kill()
    module = "tests.fault.modules.quick_watch"
    code, output = await command(
        town, tmp_path, "load", database_url=database, event_modules=[module]
    )
    assert (code, output) == (0, "loaded install: 250 rows\nwaiting: 0\n")
    assert town.mq.queue("install").size == 0
