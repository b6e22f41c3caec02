"""Which events of a body become one chunk: those of one type; with a key, of one part of it."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from datapipe.events.unknown import Kind
from datapipe.http.claims import Claim
from datapipe.http.elements import RAW_LIST, lines

# A keyed POST is cut into parts by event name and at each full 16 KiB of the body: a part must fit,
# whole, into the smallest message of any mirror (64 KB with its envelope), and the cut must depend
# on nothing but the body, so that a retry after a change of code or settings is cut alike.
PART_BYTES = 16_384

_K = TypeVar("_K")


class Run(NamedTuple):
    """Events of one type that become one chunk. Attributes: see `Chunk`."""

    kind: Kind
    indexes: Sequence[int]
    claim: tuple[str, str, int] | None = None
    name: str = ""
    lacks: str = ""


def part_of_each(body: bytes) -> list[int]:
    """The part that each event of a batch falls into."""
    raws = RAW_LIST.decode(body) if body.startswith(b"[") else lines(body)
    return _part_numbers([len(memoryview(raw)) for raw in raws])


def _part_numbers(sizes: list[int]) -> list[int]:
    starts = itertools.accumulate(sizes[:-1], initial=0)
    return [start // PART_BYTES for start in starts]


def runs_of(
    names: Sequence[str | None],
    kinds: Sequence[Kind | None],
    sizes: list[int],
    claim: Claim | None,
) -> Iterator[Run]:
    """Of a body some events of which are rejected: those have no type; not even a name, if it can't
    be read.
    """
    if claim is None:
        yield from (Run(kind, indexes) for (kind, _), indexes in grouped(kinds, None) if kind)
        return
    numbers = _part_numbers(sizes)
    lacks = _lacks(names, kinds, numbers) if None in kinds else {}
    named = [kind and (kind, name or "") for kind, name in zip(kinds, names, strict=True)]
    for (accepted, number), indexes in grouped(named, numbers):
        if accepted:
            kind, name = accepted
            own = "" if name == kind.name else name
            lacking = lacks.get((name, number), "")
            yield Run(kind, indexes, (*claim, number), own, lacking)


def _lacks(
    names: Sequence[str | None], kinds: Sequence[Kind | None], numbers: Sequence[int]
) -> dict[tuple[str, int], str]:
    """What parts lack (see `Chunk`), by name and number.

    What has no name that can be read is rejected at each try, so it counts nowhere.
    """
    counts: Counter[tuple[str, int]] = Counter()
    bits: Counter[tuple[str, int]] = Counter()
    for name, kind, number in zip(names, kinds, numbers, strict=True):
        if name is not None:
            if kind is None:
                bits[name, number] |= 1 << counts[name, number]
            counts[name, number] += 1
    return {part: f"{lacking:x}" for part, lacking in bits.items()}


def grouped(
    keys: Sequence[_K], parts: Sequence[int] | None
) -> Iterable[tuple[tuple[_K, int], Sequence[int]]]:
    """Key and part, and the indexes of their events."""
    if keys.count(keys[0]) == len(keys):  # most bodies
        return _ranges(keys[0], parts or [0] * len(keys))
    groups: dict[tuple[_K, int], list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key, parts[index] if parts else 0].append(index)
    return groups.items()


def _ranges(key: _K, parts: Sequence[int]) -> Iterator[tuple[tuple[_K, int], Sequence[int]]]:
    """The same for one key: each part is a run of events."""
    start = 0
    while start < len(parts):
        end = bisect_right(parts, parts[start], start)
        yield (key, parts[start]), range(start, end)
        start = end
