"""`POST /`: body -> rows -> durable -> 200."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from datapipe.errors import BufferFull, EventRejected, Reason, Refused
from datapipe.events.registry import Registry
from datapipe.http import responses
from datapipe.http.admission import Admission, Reservation
from datapipe.http.auth import given_key
from datapipe.http.body import Body, Headers, read_body
from datapipe.http.claims import Claim, Claims
from datapipe.http.cors import Cors
from datapipe.http.parse import Parser
from datapipe.http.responses import Answer
from datapipe.pipeline.buffer import Buffer
from datapipe.pipeline.records import Records, Refusal, shown
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
        self._cors = Cors(settings.cors_origins)
        self._clock = _Clock()
        given = (k if isinstance(k, str) else k.key for k in settings.ingest_keys)
        self._keys = [key.encode() for key in given]
        self._hashes = {key: _hash(key).encode() for key in (b"", *self._keys)}

    async def answer(
        self, headers: Headers, key: str | None, source: bytes | Body, request_id: str
    ) -> Answer:
        """Answer one POST. Raises nothing.

        Args:
            key: the one in the query.
            source: the body, or how it is read while some of it may be on its way.
        """
        body, reservation = b"", Reservation(self.admission)
        try:
            self.admission.check()
            ingest_key = self._authorize(headers, key)
            idempotency_key = _idempotency_key(headers)
            body = await read_body(source, headers, self._settings, reservation)
            claim = self._claim(ingest_key, idempotency_key, body)
            parsed = await self._parser.parse(body, self._clock.now(), claim)
            full = self.admission.refuse_full(parsed, keyed=claim is not None)
            if parsed.chunks:
                reservation.grow(sum([len(chunk.data) for chunk in parsed.chunks]))
                if claim:
                    self._buffer.check(parsed.chunks)
                    self._claims.enter(claim)  # by now another one may have come
                await self._buffer.append(parsed.chunks)
            if parsed.errors:
                self._refused(parsed.errors, request_id)
            answer = responses.OK
            if parsed.batch:
                accepted = sum([c.events for c in parsed.chunks])
                answer = responses.batch(accepted, parsed.errors, full)
        except Exception as exc:
            answer = self._failed(exc, body, request_id)
        finally:
            reservation.end()
        return self._cors.apply(answer, headers)

    def take(
        self,
        headers: Headers,
        key: str | None,
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
            answer = responses.OK if error is None else self._failed(error, body, request_id)
            send(self._cors.apply(answer, headers))

        try:
            ingest_key = self._authorize(headers, key) if self._keys else b""
            claim = None
            if "Idempotency-Key" in headers:
                claim = self._claim(ingest_key, _idempotency_key(headers), body)
            chunk = self._parser.single(body, self._clock.now(), claim)
            if chunk is None or self._buffer.mirror.full((chunk.lane,)):
                return False
        except Exception:
            return False  # `answer` meets it again, and says what it was
        held += len(chunk.data)
        if not self.admission.enter(held):
            return False
        try:
            self._buffer.add(chunk, done)
        except BufferFull:
            self.admission.leave(held)
            return False
        if claim:
            self._claims.enter(claim)
        return True

    def _claim(self, ingest_key: bytes, idempotency_key: str | None, body: bytes) -> Claim | None:
        """The hashes that stand for the keys and for the body.

        Raises: EventRejected: the key was used with another body.
        """
        if idempotency_key is None:
            return None
        claim = _hash(self._hashes[ingest_key] + idempotency_key.encode()), _hash(body)
        self._claims.check(claim)
        return claim

    def _failed(self, error: Exception, body: bytes, request_id: str) -> Answer:
        """The answer to a POST of which nothing is promised."""
        if not isinstance(error, Refused):
            return responses.internal_error(error, request_id, "/")
        if isinstance(error, EventRejected):
            error.body = error.body or body
        self._refused([(0, error)], request_id)
        return responses.refused(error, stopping=self._buffer.stopping)

    def _refused(self, errors: Sequence[tuple[int, Refused]], request_id: str) -> None:
        """Count what was refused, and record the first of it for admins to see."""
        for _, error in errors:
            self._records.rejected[error.reason.label] += 1
        first = errors[0][1]
        reason, body = first.reason, shown(first.body)
        self._records.refused(
            Refusal(reason.label, reason.code, first.detail, request_id, len(errors), body)
        )

    def _authorize(self, headers: Headers, in_query: str | None) -> bytes:
        """The ingest key that was given, empty when none is required. Raises: EventRejected."""
        if not self._keys:
            return b""
        given = given_key(headers, in_query)
        # every key is compared, even after a match: the time must reveal nothing
        if not sum([hmac.compare_digest(given, key) for key in self._keys]):
            raise EventRejected(Reason.UNAUTHORIZED, "no or wrong ingest key")
        return given


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
    if "Idempotency-Key" not in headers:
        return None
    values = headers.getall("Idempotency-Key")
    if len(values) != 1 or not _KEY_FORM.fullmatch(values[0]):
        detail = "Idempotency-Key: 1 to 255 visible ASCII characters wanted, once"
        raise EventRejected(Reason.BAD_JSON, detail)
    return values[0]


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
