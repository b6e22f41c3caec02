"""POSTs of pieces: sent again for as long as that helps, in halves where a whole is too much."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import aiohttp
import msgspec

from datapipe.cli.answers import unanswered
from datapipe.cli.send.cut import Piece, Refusal
from datapipe.cli.send.state import fingerprint
from datapipe.errors import DatapipeError
from datapipe.retry import backoff

_MAX_WAIT_S = 30.0
_TIMEOUT = aiohttp.ClientTimeout(total=120, sock_connect=10)


class Answer(NamedTuple):
    """What came back for one POST; `content` is empty where it is no JSON object."""

    status: int
    content: dict[str, Any]
    again_s: float | None

    @property
    def message(self) -> str:
        return str(self.content.get("status_message", ""))


class Outcome(NamedTuple):
    """What became of a piece. `refusals` may name more items than were `refused`: see `judge`."""

    accepted: int
    refused: int
    refusals: list[Refusal]


class Client:
    """Delivers pieces to one service, a few at a time.

    Attributes:
        waiting: pieces that wait for their lane to have room.
        trouble: why nothing gets through just now; empty: it does.
    """

    def __init__(self, url: str, key: str, parallel: int, changed: Callable[[], None]) -> None:
        """Args: key: an ingest key, or empty. changed: called when `waiting` changes."""
        self.url = url
        self.waiting: set[Piece] = set()
        self.trouble = ""
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._slots = asyncio.Semaphore(parallel)
        self._changed = changed
        self._full_until: dict[str, float] = {}

    async def __aenter__(self) -> Client:
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=_TIMEOUT, headers=self._headers
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def deliver(self, piece: Piece, id: str, note: Callable[[Outcome], None]) -> None:
        """Returns once each item is taken or refused; `note` gets what became of them.

        Raises: DatapipeError: a person must act.
        """
        left = [piece]
        while left:
            part = left.pop()
            answer = await self._answered(part, id)
            if answer.status in (400, 413) and "errors" not in answer.content and part.items[1:]:
                left += reversed(part.halves())  # it says nothing about each item
            else:
                note(judge(part, answer, self.url))

    async def _answered(self, piece: Piece, id: str) -> Answer:
        """The answer that is not to wait and come again."""
        body = piece.body()
        about = f"{id}\0{piece.number}\0{piece.part}\0{fingerprint(body)}"
        key, failures = fingerprint(about.encode(errors="surrogateescape")), 0
        while True:
            await self._until_room(piece)
            async with self._slots:
                if self._full_until.get(piece.lane, 0) > time.monotonic():
                    continue  # another has found it full meanwhile
                while (answer := await self._post(body, key)) is None or self._is_trouble(answer):
                    failures += 1
                    if answer and answer.again_s is not None:
                        failures = 1  # it says when, and only chance is added
                    wait_s = backoff(failures, _MAX_WAIT_S)
                    await asyncio.sleep(wait_s + ((answer and answer.again_s) or 0))
            self.trouble, failures = "", 0
            if "busy" not in answer.content:
                return answer
            wait_s = (answer.again_s or 1) + backoff(1, _MAX_WAIT_S)
            self._full_until[piece.lane] = time.monotonic() + wait_s

    def _is_trouble(self, answer: Answer) -> bool:
        """Whether nothing gets through, so that others need not try: each keeps its slot."""
        passing = answer.status in (408, 429) or answer.status >= 500
        if passing and "busy" not in answer.content:
            self.trouble = f"{self.url} answers {answer.status} {answer.message}".rstrip()
            return True
        return False

    async def _until_room(self, piece: Piece) -> None:
        """Wait while its lane is known to be full."""
        while (wait_s := self._full_until.get(piece.lane, 0) - time.monotonic()) > 0:
            self.waiting.add(piece)
            self._changed()
            try:
                await asyncio.sleep(wait_s)
            finally:
                self.waiting.discard(piece)

    async def _post(self, body: bytes, key: str) -> Answer | None:
        """None: no answer; it may be taken or not, and the key sees to both."""
        try:
            async with self._session.post(
                self.url, data=body, headers={"Idempotency-Key": key}, allow_redirects=False
            ) as response:
                text = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            self.trouble = f"{self.url} does not answer: {unanswered(exc)}"
            return None
        try:
            content = msgspec.json.decode(text, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError):
            content = {}
        return Answer(response.status, content, _seconds(response.headers.get("Retry-After")))


def _seconds(text: str | None) -> float | None:
    """Of `Retry-After`, which a proxy may give as a date: then we wait as we do without."""
    return float(text) if text and text.isdecimal() else None


def judge(piece: Piece, answer: Answer, url: str) -> Outcome:
    """What became of the items of a piece.

    An answer names the first 100 refused items alone. Where there are more, the ones behind them
    may be among those, and are all told, with how many it are.

    Raises: DatapipeError: a person must act.
    """
    status, content = answer.status, answer.content
    events = len(piece.items)
    if status in (200, 202, 207, 400, 413) and "status_code" in content:
        errors = content.get("errors", ())
        if status >= 400 and not errors:
            errors = [{"index": 0, **content}]
        accepted = content.get("accepted", 0 if errors else events)
        refused = events - accepted
        told = [_refusal(piece, e["index"], e["status_code"], e["status_message"]) for e in errors]
        if more := refused - len(told):
            after = range(errors[-1]["index"] + 1, events)
            why = "rejected, as others of its POST"
            if more < len(after):
                why = f"{more} of {len(after)} events are rejected, and this may be one of them"
            told += [_refusal(piece, index, None, why) for index in after]
        return Outcome(accepted, refused, told)
    said = f": {answer.message}" if answer.message else ""
    remedy = {
        401: "; set DATAPIPE_INGEST_KEYS, or name a file with the key by --key-file",
        403: f"; the events are of type {piece.lane!r}",
    }.get(status, "")
    raise DatapipeError(f"{url} answers {status}{said or ', which datapipe never does'}{remedy}")


def _refusal(piece: Piece, index: int, code: int | None, message: str) -> Refusal:
    number = piece.start.item + 1 + piece.indexes[index]
    return Refusal(number, code, message, piece.items[index])
