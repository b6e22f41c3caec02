"""Ingest keys: who posts, which lanes are open to it, and how many events a second."""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Collection, Sequence
from time import monotonic

from datapipe.errors import ConfigError, EventRejected, RateLimited, Reason
from datapipe.events.unknown import UNKNOWN
from datapipe.http.auth import Credentials, given_key
from datapipe.pipeline.records import KeyUse, Records
from datapipe.settings import IngestKey

_BUCKET_S = 10.0
_LONGEST_S = 1e9  # that Retry-After says
_REMEMBERED, _REMEMBERED_CHARS = 1024, 512


class Bucket:
    """A token bucket that holds what the rate lets through in 10 s, kept as one time.

    That is the time until which all accepted events are paid for: each puts it off by `1 / rate`,
    and it is never more than 10 s in the past. While it lies in the future, too much was taken.
    """

    __slots__ = ("_name", "_paid_until", "_rate")

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._rate = 0.0
        self._paid_until = -math.inf

    def set_rate(self, rate: float) -> None:
        """Args: rate: events a second; 0: no bound. Where it is another one, the bucket is full."""
        if rate != self._rate:
            self._rate, self._paid_until = rate, -math.inf

    def take(self, events: int) -> None:
        """For so many events that are to be accepted.

        Raises: RateLimited: too much was taken before; until when it is paid for.
        """
        if self._rate:
            now, paid_until = monotonic(), self._paid_until
            if paid_until > now:
                rate = f"its rate of {self._rate:.15g} events a second"
                detail = f"ingest key {self._name!r}: more than {rate}"
                raise RateLimited(detail, min(paid_until - now, _LONGEST_S))
            self._paid_until = max(paid_until, now - _BUCKET_S) + events / self._rate

    def give_back(self, events: int) -> None:
        """They were not accepted."""
        if self._rate:
            self._paid_until -= events / self._rate


class Grant:
    """What a POST may do with the key that it bears.

    Attributes:
        scope: within it idempotency keys are told apart: the name's, or the key's.
        lanes: those that it may post to; None: all.
        use, bucket: shared by all keys of one name; they outlive a reload.
    """

    __slots__ = ("bucket", "lanes", "scope", "use")

    def __init__(
        self, scope: bytes, lanes: frozenset[str] | None, use: KeyUse, bucket: Bucket
    ) -> None:
        self.scope = scope
        self.lanes = lanes
        self.use = use
        self.bucket = bucket


ANYBODY = Grant(hashlib.blake2b(b"", digest_size=16).hexdigest().encode(), None, KeyUse(), Bucket())


class IngestKeys:
    """The keys of the setting `ingest_keys`; without any, anybody may post.

    Args:
        records: gets the use of each name.
        types: the names of all event types.
    Raises: ConfigError: see `reload`.
    """

    def __init__(
        self, entries: Sequence[str | IngestKey], records: Records, types: Collection[str]
    ) -> None:
        self._records = records
        self._types = frozenset(types)
        self._buckets: dict[str, Bucket] = {}
        self.reload(entries)

    def reload(self, entries: Sequence[str | IngestKey]) -> None:
        """From now on these count; a POST under way keeps the grant that it has.

        Raises: ConfigError: a lane that there is not is named; nothing has changed.
        """
        check_lanes(entries, self._types)
        self._grants = [self._compiled(entry) for entry in entries]
        # those that were granted: a client has the same each time. A table by hash reveals nothing
        # to those who guess: they don't know this process's hashes
        self._remembered: dict[Credentials, Grant] = {}

    def grant(self, credentials: Credentials) -> Grant:
        """Raises: EventRejected: no or wrong key."""
        if not self._grants:
            return ANYBODY
        if (found := self._remembered.get(credentials)) is not None:
            return found
        given = given_key(credentials)
        # every key is compared, even after a match: the time must reveal nothing
        fitting = [grant for key, grant in self._grants if hmac.compare_digest(given, key)]
        if not fitting:
            raise EventRejected(Reason.UNAUTHORIZED, "the ingest key is missing or wrong")
        if sum(len(text or "") for text in credentials) <= _REMEMBERED_CHARS:
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            self._remembered[credentials] = fitting[0]
        return fitting[0]

    def _compiled(self, entry: str | IngestKey) -> tuple[bytes, Grant]:
        if isinstance(entry, str):
            scope = _scope(entry.encode())
            return entry.encode(), Grant(scope, None, KeyUse(), Bucket())
        name = entry.name
        use = self._records.keys.setdefault(name, KeyUse())
        bucket = self._buckets.setdefault(name, Bucket(name))
        bucket.set_rate(entry.rate)
        lanes = frozenset(entry.lanes) or self._types - {UNKNOWN}
        # no key has the scope of a name: they are hashed apart
        return entry.key.encode(), Grant(_scope(name.encode(), b"name"), lanes, use, bucket)


def check_lanes(entries: Sequence[str | IngestKey], types: Collection[str]) -> None:
    """Raises: ConfigError: a lane that there is not is named."""
    known = {*types, UNKNOWN}
    for entry in [each for each in entries if isinstance(each, IngestKey)]:
        for lane in sorted({*entry.lanes} - known):
            import difflib

            near = difflib.get_close_matches(lane, known, n=1, cutoff=0.0)
            why = f"{entry.name!r} may post to {lane!r}, and there is no such event type"
            raise ConfigError(f"ingest_keys: {why}; the nearest is {near[0]!r}")


def _scope(data: bytes, person: bytes = b"") -> bytes:
    return hashlib.blake2b(data, digest_size=16, person=person).hexdigest().encode()
