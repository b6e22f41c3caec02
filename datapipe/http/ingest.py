"""`POST /`: body -> rows -> durable -> 200; or, with `Prefer: wait`, -> loaded -> 200."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from hashlib import blake2b

from datapipe.errors import BufferFull, EventRejected, Reason, Refused
from datapipe.events.registry import Registry
from datapipe.http import responses
from datapipe.http.admission import Admission, Reservation
from datapipe.http.auth import Credentials
from datapipe.http.body import Body, Headers, read_body
from datapipe.http.claims import Claim, Claims
from datapipe.http.cors import Cors
from datapipe.http.ingest_keys import ANYBODY, IngestKeys
from datapipe.http.parse import Parser
from datapipe.http.prefer import wait_seconds
from datapipe.http.responses import Answer
from datapipe.http.traceparent import trace_ids
from datapipe.pipeline.buffer import Buffer
from datapipe.pipeline.records import KeyUse, Records, Refusal, shown
from datapipe.pipeline.waiters import Wait
from datapipe.settings import Settings

_KEY_FORM = re.compile(r"[\x21-\x7e]{1,255}")


class Ingest:
    """Accepts events, and counts those that it refuses, by reason.

    Attributes: observe: gets the seconds that each POST took, once its answer is written.
    """

    def __init__(
        self,
        buffer: Buffer,
        registry: Registry,
        settings: Settings,
        keys: IngestKeys,
        cors: Cors,
        records: Records,
        observe: Callable[[float], None],
    ) -> None:
        self.observe = observe
        self.admission = Admission(buffer, settings.inflight_max_bytes)
        self._buffer = buffer
        self._parser = Parser(registry, settings.batch_max_events)
        self._claims = Claims(settings.claims_max_bytes, settings.dedupe_window)
        self._settings = settings
        self._records = records
        self._keys = keys
        self._cors = cors
        self._clock = _Clock()

    async def answer(
        self,
        headers: Headers,
        credentials: Credentials,
        source: bytes | Body,
        request_id: str,
        gone: Callable[[], asyncio.Future[None]] | None = None,
    ) -> Answer:
        """Answer one POST. Raises nothing.

        Args:
            credentials: who sends it.
            source: the body, or how it is read while some of it may be on its way.
            gone: gives what is done once the client has left.
        """
        seconds = wait_seconds(headers)
        wait = None if seconds is None else Wait(seconds)
        reservation = Reservation(self.admission)
        try:
            storing = self._store(headers, credentials, source, request_id, reservation, wait)
            del source  # whoever waits holds no body meanwhile
            answer = await storing
            if wait is not None and answer.status < 300:  # something was accepted
                reservation.release()
                loaded = await wait.loaded(gone and gone())
                answer = responses.waited(answer, wait.seconds, loaded, wait.dead)
        finally:
            reservation.end()
            if wait is not None:
                self._buffer.waiters.leave(wait)
        return self._cors.apply(answer, headers)

    async def _store(
        self,
        headers: Headers,
        credentials: Credentials,
        source: bytes | Body,
        request_id: str,
        reservation: Reservation,
        wait: Wait | None,
    ) -> Answer:
        """Receive a body, check it, make its rows durable."""
        body, grant, taken = b"", ANYBODY, 0
        try:
            self.admission.check()
            grant = self._keys.grant(credentials)
            grant.use.last_seen = self._clock.now()
            grant.bucket.take(0)
            idempotency_key = _idempotency_key(headers)
            body = await read_body(source, headers, self._settings, reservation)
            claim = self._claim(grant.scope, idempotency_key, body)
            parsed = await self._parser.parse(body, self._clock.now(), claim, grant.lanes)
            full = self.admission.refuse_full(parsed, keyed=claim is not None)
            if parsed.chunks:
                reservation.grow(sum([len(chunk.data) for chunk in parsed.chunks]))
                events = sum([chunk.events for chunk in parsed.chunks])
                grant.bucket.take(events)
                taken = events
                if claim:
                    self._buffer.check(parsed.chunks)
                    self._claims.check(claim)  # by now another body may have come
                    self._claims.enter(claim)
                await self._buffer.append(parsed.chunks, wait)
                grant.use.accepted += taken
            if parsed.errors:
                self._refused(parsed.errors, headers, request_id, grant.use)
            answer = responses.OK
            if parsed.batch:
                answer = responses.batch(taken, parsed.errors, full)
        except Exception as exc:
            grant.bucket.give_back(taken)
            answer = self._failed(exc, body, headers, request_id, grant.use)
        return answer

    def take(
        self,
        headers: Headers,
        credentials: Credentials,
        body: bytes,
        request_id: str,
        send: Callable[[Answer], None],
    ) -> bool:
        """Take one event at once, if nothing speaks against it; `send` gets its answer.

        Whatever is not as it should be is for `answer` to judge, by the same steps.

        Returns: false: nothing has happened. Raises nothing.
        """
        encoded = "Content-Encoding" in headers
        if encoded or self._buffer.stopping or len(body) > self._settings.body_max_len:
            return False
        held = len(body)

        def done(error: Exception | None) -> None:
            self.admission.leave(held)
            answer = responses.OK
            if error is None:
                grant.use.accepted += 1
            else:
                grant.bucket.give_back(1)
                answer = self._failed(error, body, headers, request_id, grant.use)
            send(self._cors.apply(answer, headers))

        try:
            grant = self._keys.grant(credentials)
            claim = None
            if "Idempotency-Key" in headers:
                claim = self._claim(grant.scope, _idempotency_key(headers), body)
            now = self._clock.now()
            chunk = self._parser.single(body, now, claim, grant.lanes)
            if chunk is None or self._buffer.mirror.full((chunk.lane,)):
                return False
            grant.bucket.take(1)
        except Exception:
            return False  # `answer` meets it again, and says what it was
        held += len(chunk.data)
        if self.admission.enter(held):
            try:
                self._buffer.add(chunk, done)
            except BufferFull:
                self.admission.leave(held)
            else:
                if claim:
                    self._claims.enter(claim)
                grant.use.last_seen = now
                return True
        grant.bucket.give_back(1)
        return False

    def _claim(self, scope: bytes, idempotency_key: str | None, body: bytes) -> Claim | None:
        """The hashes that stand for the keys and for the body.

        Raises: EventRejected: the key was used with another body.
        """
        if idempotency_key is None:
            return None
        claim = _hash(scope + idempotency_key.encode()), _hash(body)
        self._claims.check(claim)
        return claim

    def _failed(
        self, error: Exception, body: bytes, headers: Headers, request_id: str, use: KeyUse
    ) -> Answer:
        """The answer to a POST of which nothing is promised."""
        if not isinstance(error, Refused):
            return responses.internal_error(error, headers, request_id, "/")
        if isinstance(error, EventRejected):
            error.body = error.body or body
        self._refused([(0, error)], headers, request_id, use)
        return responses.refused(error, stopping=self._buffer.stopping)

    def _refused(
        self,
        errors: Sequence[tuple[int, Refused]],
        headers: Headers,
        request_id: str,
        use: KeyUse,
    ) -> None:
        """Count what was refused, and record the first of it for admins to see."""
        for _, error in errors:
            self._records.rejected[error.reason.label] += 1
        first = errors[0][1]
        if first.reason is Reason.RATE_LIMITED:
            use.limited += 1
        else:
            use.rejected += len(errors)
        reason, body = first.reason, shown(first.body)
        self._records.refused(
            Refusal(
                reason.label, reason.code, first.detail, request_id, len(errors), body,
                **trace_ids(headers),
            )
        )  # fmt: skip


class _Clock:
    """The time as rows hold it, in UTC; all but the microseconds is formatted once a second."""

    def __init__(self) -> None:
        self._since_us = -1_000_000  # where the second began that `_text` says
        self._text = ""

    def now(self) -> str:
        micros = time.time_ns() // 1000 - self._since_us
        if not 0 <= micros < 1_000_000:
            second, micros = divmod(self._since_us + micros, 1_000_000)
            self._text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%d %H:%M:%S")
            self._since_us = second * 1_000_000
        return f"{self._text}.{micros:06d}"


def _idempotency_key(headers: Headers) -> str | None:
    """The key, or None. Raises: EventRejected: it is malformed."""
    values = headers.getall("Idempotency-Key", None)
    if values is None:
        return None
    if len(values) != 1 or not _KEY_FORM.fullmatch(values[0]):
        detail = "Idempotency-Key: must be 1 to 255 visible ASCII characters, given once"
        raise EventRejected(Reason.BAD_JSON, detail)
    return values[0]


def _hash(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()
