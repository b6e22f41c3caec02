"""The setting `ingest_keys`: who may post, where to, and how much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from datapipe.settings.values import FINITE


class IngestKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An ingest key with a name: what may be done with it.

    Attributes:
        lanes: that it may post to; empty: all that are registered.
        rate: accepted events a second and process; 0: no bound.
    """

    name: Annotated[str, Meta(min_length=1)]
    key: Annotated[str, Meta(min_length=1)]
    lanes: list[str] = []
    rate: Annotated[float, Meta(ge=0, le=FINITE)] = 0.0

    def __repr__(self) -> str:
        return f"IngestKey(name={self.name!r}, key='***', lanes={self.lanes!r}, rate={self.rate!r})"

    def allows(self) -> tuple[frozenset[str], float]:
        """What all entries of one name have in common."""
        return frozenset(self.lanes), self.rate


def key_fault(entries: Sequence[str | IngestKey]) -> str | None:
    """What contradicts another entry, in words that show no key; or None."""
    by_key: dict[str, str | IngestKey] = {}
    by_name: dict[str, IngestKey] = {}
    for index, entry in enumerate(entries):
        key = entry if isinstance(entry, str) else entry.key
        if by_key.setdefault(key, entry) != entry:
            return f"the key of entry {index} is there twice, with different rights"
        if isinstance(entry, str):
            continue
        if by_name.setdefault(entry.name, entry).allows() != entry.allows():
            return f"entries of the name {entry.name!r} must have the same `lanes` and `rate`"
    return None
