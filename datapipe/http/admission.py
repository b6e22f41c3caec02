"""What can't be accepted now, and when to retry: decided before anything of a POST is stored.

What only an append can find out (the mirror is full, or away) `Buffer.append` raises: `Busy` too.
"""

from __future__ import annotations

from datapipe.errors import BufferFull, Busy
from datapipe.http.parse import Parsed
from datapipe.pipeline.buffer import Buffer

SMALL_BODY_BYTES = 65_536


class Admission:
    """All requests under way.

    Attributes:
        requests: how many there are.
        bytes: what all of them hold: bytes received, and rows not yet durable.
        max_bytes: the limit of `bytes`.
    """

    def __init__(self, buffer: Buffer, max_bytes: int) -> None:
        self.requests = 0
        self.bytes = 0
        self.max_bytes = max_bytes
        self._buffer = buffer

    def check(self) -> None:
        """Raises: Busy: the service is stopping."""
        if self._buffer.stopping:
            raise Busy("shutting down")

    def enter(self, count: int) -> bool:
        """Count a request that holds so many bytes, unless all of them would hold too many."""
        if self.bytes + count > self.max_bytes * _share(count):
            return False
        self.requests += 1
        self.bytes += count
        return True

    def leave(self, count: int) -> None:
        """A request that entered is over."""
        self.requests -= 1
        self.bytes -= count

    def refuse_full(self, parsed: Parsed, keyed: bool) -> list[str]:
        """Turn the events of full lanes into errors; returns these lanes.

        Raises: BufferFull: it was a single event, or has an idempotency key: such a POST is taken
        whole, or not at all, as all of it is sent again.
        """
        full = self._buffer.mirror.full([chunk.lane for chunk in parsed.chunks])
        if not full:
            return []
        if keyed:
            lanes = sorted(full)
            raise BufferFull(f"no room for {', '.join(lanes)}; nothing is stored", lanes=lanes)
        for chunk in parsed.chunks:
            if chunk.lane in full:
                error = BufferFull(full[chunk.lane])
                if not parsed.batch:
                    raise error
                parsed.errors += [(index, error) for index in chunk.indexes]
        parsed.errors.sort(key=lambda error: error[0])
        parsed.chunks = [chunk for chunk in parsed.chunks if chunk.lane not in full]
        return sorted(full)


class Reservation:
    """One request under way, and the bytes that it holds until `end`."""

    __slots__ = ("_admission", "_bytes")

    def __init__(self, admission: Admission) -> None:
        admission.requests += 1
        self._admission = admission
        self._bytes = 0

    def grow(self, count: int) -> None:
        """Hold so many more bytes. Raises: BufferFull: too many are held by all requests."""
        self._bytes += count
        self._admission.bytes += count
        if self._admission.bytes > self._admission.max_bytes * _share(self._bytes):
            raise BufferFull("too much is under way (inflight_max_bytes)", retry_after_s=1.0)

    def release(self) -> None:
        """Hold no bytes any more; the request goes on."""
        self._admission.bytes -= self._bytes
        self._bytes = 0

    def end(self) -> None:
        self._admission.leave(self._bytes)


def _share(count: int) -> float:
    """Of all bytes, those that a request that holds so many may get at.

    A quarter is kept for small bodies, so that a few large ones can't shut out the rest.
    """
    return 0.75 if count > SMALL_BODY_BYTES else 1.0
