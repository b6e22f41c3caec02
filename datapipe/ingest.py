"""`POST /`: body -> rows -> durable -> 200."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog
from aiohttp import BasicAuth, web

from datapipe import answers
from datapipe.bodies import Parsed, Rows, parse
from datapipe.buffer import Buffer
from datapipe.commit import Chunk
from datapipe.errors import BufferFull, Busy, EventRejected
from datapipe.recent import Recent, Refusal, shown
from datapipe.registry import Registry
from datapipe.server import request_id
from datapipe.settings import Settings
from datapipe.unpack import Inflight, Lease, read_body

if TYPE_CHECKING:
    from collections.abc import Mapping

_KEY_FORM = re.compile(r"[\x21-\x7e]{1,255}")
log = structlog.stdlib.get_logger("datapipe.ingest")


class Ingest:
    """The door: takes events, and counts those that it refuses, by reason."""

    def __init__(self, buffer: Buffer, registry: Registry, settings: Settings) -> None:
        self.buffer = buffer
        self.stopping = False
        self.rejected: Counter[str] = Counter()
        self.recent = Recent()
        self.under_way = 0
        self._registry = registry
        self._settings = settings
        self._inflight = Inflight(settings.inflight_max_bytes)
        self._keys = [key.encode() for key in settings.ingest_keys]

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one POST; errors of the request are answers, faults of ours are raised."""
        self.under_way += 1
        lease = Lease(self._inflight)
        try:
            if self.stopping:
                raise Busy("shutting down")
            return await self._take(request, lease)
        except EventRejected as exc:
            self.rejected[exc.reason] += 1
            response = answers.rejected(exc)
            self._note(request, response, [(0, exc)])
            return response
        except Busy as exc:
            self.rejected["busy"] += 1
            response = answers.busy(exc)
            self._note(request, response, [(0, EventRejected(9, "busy", exc.detail, 503))])
            if self.stopping:
                response.force_close()
            return response
        finally:
            self.under_way -= 1
            lease.release()

    async def _take(self, request: web.BaseRequest, lease: Lease) -> web.StreamResponse:
        ingest_key = self._authorize(request)
        settings = self._settings
        claim = _idempotency_key(request, ingest_key)
        body = await read_body(request, settings.body_max_len, settings.request_timeout, lease)
        received_at = datetime.now(UTC).isoformat(" ")
        try:
            parsed = await parse(
                body, self._registry, settings.batch_max_events, received_at, claim is not None
            )
        except EventRejected as exc:
            exc.body = exc.body or body
            raise
        full = self._refuse_full(parsed)
        for _, error in parsed.errors:
            self.rejected[error.reason] += 1
        if parsed.rows:
            lease.take(sum(len(rows.data) for rows in parsed.rows))
            await self.buffer.append(self._chunks(parsed.rows, claim, body))
        if not parsed.batch:
            return answers.ok() if parsed.rows else _single_refused(full)
        accepted = sum(rows.events for rows in parsed.rows)
        response = answers.batch(accepted, parsed.errors, full)
        if parsed.errors:
            self._note(request, response, parsed.errors)
        return response

    def _note(
        self,
        request: web.BaseRequest,
        response: web.Response,
        errors: Sequence[tuple[int, EventRejected]],
    ) -> None:
        """Keep what was refused, for admins to see, under the id that the client gets."""
        id = response.headers["X-Request-ID"] = request_id(request)
        first = min(errors, key=lambda error: error[0])[1]
        self.recent.refused(
            Refusal(first.reason, first.code, first.detail, id, len(errors), shown(first.body))
        )

    def _authorize(self, request: web.BaseRequest) -> bytes:
        """The ingest key that was given, empty when none is wanted. Raises: EventRejected."""
        if not self._keys:
            return b""
        given = given_key(request.headers, request.query.get("key"))
        # every key is compared, whichever fits: the time tells nothing
        if not sum([hmac.compare_digest(given, key) for key in self._keys]):
            raise EventRejected(8, "unauthorized", "no or wrong ingest key", 401)
        return given

    def _refuse_full(self, parsed: Parsed) -> list[str]:
        """Turn rows of full lanes into errors; the lanes, so that the client knows."""
        full = {rows.lane for rows in parsed.rows if self.buffer.is_full(rows.lane)}
        if not full:
            return []
        for rows in parsed.rows:
            if rows.lane in full:
                error = EventRejected(9, "busy", f"the lane {rows.lane} is full", 503)
                parsed.errors += [(index, error) for index in rows.indexes]
        parsed.rows = [rows for rows in parsed.rows if rows.lane not in full]
        return sorted(full)

    def _chunks(self, rows: Sequence[Rows], claim: str | None, body: bytes) -> list[Chunk]:
        types = self._registry.types
        if claim is None:
            return [Chunk(r.lane, types[r.lane].columns, r.data, r.events) for r in rows]
        digest = _hash(body)
        return [
            Chunk(r.lane, types[r.lane].columns, r.data, r.events, (claim, digest, r.part))
            for r in rows
        ]


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


def _idempotency_key(request: web.BaseRequest, ingest_key: bytes) -> str | None:
    """The hash that stands for the key. Raises: EventRejected: out of form."""
    if "Idempotency-Key" not in request.headers:
        return None
    values = request.headers.getall("Idempotency-Key")
    if len(values) != 1 or not _KEY_FORM.fullmatch(values[0]):
        detail = "Idempotency-Key: 1 to 255 visible ASCII characters wanted, once"
        raise EventRejected(3, "bad_json", detail)
    return _hash(_hash(ingest_key).encode() + values[0].encode())


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _single_refused(full: Sequence[str]) -> web.StreamResponse:
    """A single event whose lane is full."""
    return answers.busy(BufferFull(f"the lane {full[0]} is full"))
