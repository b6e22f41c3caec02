"""`POST /`: body -> rows -> durable -> 200."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from aiohttp import BasicAuth, web

from datapipe.errors import BufferFull, Busy, EventRejected
from datapipe.events.registry import Registry
from datapipe.http import responses
from datapipe.http.body import Headers, Inflight, Lease, read_body, unpacked
from datapipe.http.parse import Parsed, parse
from datapipe.http.responses import Answer
from datapipe.pipeline.buffer import Buffer
from datapipe.pipeline.records import Records, Refusal, shown
from datapipe.settings import Settings

_KEY_FORM = re.compile(r"[\x21-\x7e]{1,255}")


class Ingest:
    """The door: takes events, and counts those that it refuses, by reason."""

    def __init__(
        self, buffer: Buffer, registry: Registry, settings: Settings, records: Records
    ) -> None:
        self.buffer = buffer
        self.under_way = 0
        self._registry = registry
        self._records = records
        self._settings = settings
        self._inflight = Inflight(settings.inflight_max_bytes)
        self._clock = _Clock()
        self._keys = [key.encode() for key in settings.ingest_keys]

    async def handle(self, request: web.BaseRequest, request_id: str) -> Answer:
        """Answer one POST whose body may still be on its way."""
        lease = Lease(self._inflight)
        settings = self._settings

        async def body() -> bytes:
            return await read_body(request, settings.body_max_len, settings.request_timeout, lease)

        key = request.query.get("key")
        return await self._answer(request.headers, key, body(), lease, request_id)

    async def handle_whole(
        self, headers: Headers, key: str | None, packed: bytes, request_id: str
    ) -> Answer:
        """Answer one POST whose body is here; `key` is the one of the query."""
        lease = Lease(self._inflight)
        body = unpacked(packed, headers, self._settings.body_max_len, lease)
        return await self._answer(headers, key, body, lease, request_id)

    async def _answer(
        self,
        headers: Headers,
        key: str | None,
        body: Coroutine[Any, Any, bytes],
        lease: Lease,
        request_id: str,
    ) -> Answer:
        """Errors of the request are answers, faults of ours are raised."""
        self.under_way += 1
        try:
            if self.buffer.stopping:
                raise Busy("shutting down")
            ingest_key = self._authorize(headers, key)
            claim = _idempotency_key(headers, ingest_key)
            return await self._take(await body, claim, lease, request_id)
        except EventRejected as exc:
            self._records.rejected[exc.reason] += 1
            self._note(request_id, [(0, exc)])
            return responses.rejected(exc)
        except Busy as exc:
            self._records.rejected["busy"] += 1
            self._note(request_id, [(0, EventRejected(9, "busy", exc.detail, 503))])
            return responses.busy(exc, close=self.buffer.stopping)
        finally:
            body.close()
            self.under_way -= 1
            lease.release()

    async def _take(self, body: bytes, claim: str | None, lease: Lease, request_id: str) -> Answer:
        received_at = self._clock.now()
        try:
            most = self._settings.batch_max_events
            parsed = await parse(body, self._registry, most, received_at, claim is not None)
        except EventRejected as exc:
            exc.body = exc.body or body
            raise
        full = self._refuse_full(parsed)
        for _, error in parsed.errors:
            self._records.rejected[error.reason] += 1
        if parsed.chunks:
            if claim is not None:
                digest = _hash(body)
                for chunk in parsed.chunks:
                    chunk.claim = (claim, digest, chunk.part)
            lease.take(sum([len(chunk.data) for chunk in parsed.chunks]))
            await self.buffer.append(parsed.chunks)
        if parsed.errors:
            self._note(request_id, parsed.errors)
        if not parsed.batch:
            return responses.OK if parsed.chunks else _single_refused(full)
        accepted = sum(chunk.events for chunk in parsed.chunks)
        return responses.batch(accepted, parsed.errors, full)

    def _note(self, request_id: str, errors: Sequence[tuple[int, EventRejected]]) -> None:
        """Keep what was refused, for admins to see, under the id that the client gets."""
        first = min(errors, key=lambda error: error[0])[1]
        self._records.refused(
            Refusal(
                first.reason, first.code, first.detail, request_id, len(errors), shown(first.body)
            )
        )

    def _authorize(self, headers: Headers, in_query: str | None) -> bytes:
        """The ingest key that was given, empty when none is wanted. Raises: EventRejected."""
        if not self._keys:
            return b""
        given = given_key(headers, in_query)
        # every key is compared, whichever fits: the time tells nothing
        if not sum([hmac.compare_digest(given, key) for key in self._keys]):
            raise EventRejected(8, "unauthorized", "no or wrong ingest key", 401)
        return given

    def _refuse_full(self, parsed: Parsed) -> list[str]:
        """Turn rows of full lanes into errors; the lanes, so that the client knows."""
        full = self.buffer.mirror.full(chunk.lane for chunk in parsed.chunks)
        if not full:
            return []
        for chunk in parsed.chunks:
            if chunk.lane in full:
                error = EventRejected(9, "busy", f"the lane {chunk.lane} is full", 503)
                parsed.errors += [(index, error) for index in chunk.indexes]
        parsed.chunks = [chunk for chunk in parsed.chunks if chunk.lane not in full]
        return sorted(full)


class _Clock:
    """The time as rows hold it, in UTC; all but the microseconds is made once a second."""

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def now(self) -> str:
        second, micros = divmod(time.time_ns() // 1000, 1_000_000)
        if second != self._second:
            self._text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%d %H:%M:%S")
            self._second = second
        return f"{self._text}.{micros:06d}"


def given_key(headers: Mapping[str, str], in_query: str | None = None) -> bytes:
    """The key of a request: Bearer, the password of HTTP Basic, or `?key=`; else empty."""
    header = headers.get("Authorization", "")
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode(errors="surrogateescape")
    if scheme.lower() == "basic":
        try:
            password: str = BasicAuth.decode(header, encoding="utf-8").password
            return password.encode()
        except ValueError:
            return b""
    return (in_query or "").encode(errors="surrogateescape")


def _idempotency_key(headers: Headers, ingest_key: bytes) -> str | None:
    """The hash that stands for the key. Raises: EventRejected: out of form."""
    if "Idempotency-Key" not in headers:
        return None
    values = headers.getall("Idempotency-Key")
    if len(values) != 1 or not _KEY_FORM.fullmatch(values[0]):
        detail = "Idempotency-Key: 1 to 255 visible ASCII characters wanted, once"
        raise EventRejected(3, "bad_json", detail)
    return _hash(_hash(ingest_key).encode() + values[0].encode())


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _single_refused(full: Sequence[str]) -> Answer:
    """A single event whose lane is full."""
    return responses.busy(BufferFull(f"the lane {full[0]} is full"))
