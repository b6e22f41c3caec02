"""Items (lines, or elements of an array) -> blocks -> pieces of one event type each.

The cut depends on the content alone, so that a repeat gives the same pieces under the same keys:

- A *block* is the next 20,000 items, or as many as make 8 MiB if those are fewer. It is what a
  state file can name: at its end nothing is left over, so cutting goes on there as if it began.
- The items of a block are sorted by event type, and those of a type cut into *pieces* of 4,000
  items, or halves of that until none has more than 1 MiB. A piece is one POST. Pieces are numbered
  through, in the order in which their types appear.
- Where an input once ended, in the middle of a block, it is cut again when it has grown since.
  Such ends are remembered in the state file (`cuts`), *before* what is there is sent: else a run
  that dies, or one that starts from the beginning, would send that last block with more in it,
  under other keys.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import msgspec

from datapipe.errors import Reason

_BLOCK_ITEMS, _BLOCK_BYTES = 20_000, 8_388_608
_PIECE_ITEMS, _PIECE_BYTES = 4_000, 1_048_576
_BROKEN = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class Mark(msgspec.Struct, frozen=True, order=True):
    """A place in an input: how many bytes (unpacked), items and pieces come before it."""

    offset: int = 0
    item: int = 0
    piece: int = 0


class Refusal(NamedTuple):
    """An item that is not taken: its number, counted from 1, and why, as answers say it."""

    number: int
    code: int | None
    message: str
    item: bytes


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """What goes out as one POST: items of one event type, all JSON objects.

    Attributes:
        lane: the `event_name`; empty where it is no text.
        start: of its block.
        indexes: of its items, in the block.
        part: which half of which half of the piece this is; empty: all of it.
    """

    lane: str
    start: Mark
    number: int
    items: Sequence[bytes]
    indexes: Sequence[int]
    part: str = ""

    def body(self) -> bytes:
        return b"[%b]" % b",".join(self.items)

    def halves(self) -> list[Piece]:
        """The piece in two, for a service that does not take it as one."""
        middle = len(self.items) // 2
        return [
            Piece(
                self.lane, self.start, self.number, self.items[half], self.indexes[half],
                f"{self.part}{which}",
            )
            for which, half in enumerate((slice(middle), slice(middle, None)))
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Block:
    """Attributes: ended: the input ended here, in the middle of a block."""

    start: Mark
    end: Mark
    pieces: list[Piece]
    refusals: list[Refusal]
    ended: bool


def blocks(batches: Iterable[list[bytes]], start: Mark, cuts: Sequence[int]) -> Iterator[Block]:
    """The blocks of all items from `start` on.

    Args:
        batches: items, each without the one byte that comes between it and the next.
        cuts: offsets at which a block ends whatever its size, in order.
    """
    held: list[bytes] = []
    for batch in batches:
        held += batch
        while count := _full(held, start.offset, cuts):
            block = _block(held[:count], start, ended=False)
            held, start = held[count:], block.end
            yield block
    if held:
        yield _block(held, start, ended=True)


def _full(held: list[bytes], offset: int, cuts: Sequence[int]) -> int:
    """How many of these items are a block; 0: more may belong to it."""
    following = bisect_right(cuts, offset)
    bounds = [_BLOCK_BYTES, *(cut - offset for cut in cuts[following : following + 1])]
    limit = min(bounds)
    if len(held) < _BLOCK_ITEMS and sum(map(len, held)) + len(held) < limit:
        return 0
    lengths = list(accumulate(map(len, held[:_BLOCK_ITEMS])))
    counts = range(1, len(lengths) + 1)
    count = 1 + bisect_left(counts, limit, key=lambda count: lengths[count - 1] + count)
    return min(count, _BLOCK_ITEMS)


def _block(items: list[bytes], start: Mark, *, ended: bool) -> Block:
    names, refusals = _names(items, start.item + 1)
    pieces: list[Piece] = []
    for lane, indexes in _by_lane(names).items():
        for some in _pieces(items, indexes):
            number = start.piece + len(pieces)
            pieces.append(Piece(lane, start, number, _taken(items, some), some))
    size = sum(map(len, items)) + len(items)
    end = Mark(start.offset + size, start.item + len(items), start.piece + len(pieces))
    return Block(start, end, pieces, refusals, ended)


def _pieces(items: Sequence[bytes], indexes: Sequence[int]) -> Iterator[Sequence[int]]:
    """The indexes of each piece."""
    waiting = [indexes[at : at + _PIECE_ITEMS] for at in range(0, len(indexes), _PIECE_ITEMS)]
    waiting.reverse()
    while waiting:
        some = waiting.pop()
        middle = len(some) // 2
        if middle and sum(map(len, _taken(items, some))) > _PIECE_BYTES:
            waiting += [some[middle:], some[:middle]]
        else:
            yield some


def _taken(items: Sequence[bytes], indexes: Sequence[int]) -> Sequence[bytes]:
    if isinstance(indexes, range):
        return items[indexes.start : indexes.stop]
    return [items[i] for i in indexes]


def _by_lane(names: Sequence[str | None]) -> Mapping[str, Sequence[int]]:
    """The indexes of each lane's items; None: not to be sent."""
    first = names[0]
    if first is not None and names.count(first) == len(names):  # most files
        return {first: range(len(names))}
    lanes: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        if name is not None:
            lanes[name].append(index)
    return lanes


class _Event(msgspec.Struct, gc=False):
    event_name: Any = None


_decode = msgspec.json.Decoder(_Event).decode


def _names(items: Sequence[bytes], number: int) -> tuple[Sequence[str | None], list[Refusal]]:
    """The lane of each item, None if it goes nowhere; and those that are no JSON objects.

    What is one is for the service to judge. Args: number: of the first.
    """
    if all(map(bytes.isascii, items)):
        try:
            names = [event.event_name for event in map(_decode, items)]
        except _BROKEN:
            pass
        else:
            if set(map(type, names)) == {str}:
                return names, []
    refusals: list[Refusal] = []
    lanes: list[str | None] = []
    for at, item in enumerate(items, number):
        lanes.append(None)
        if not item.strip():
            continue  # a blank line
        try:
            item.decode()
            name = _decode(item).event_name
            lanes[-1] = name if type(name) is str else ""
        except msgspec.ValidationError as exc:
            why = f"an event is a JSON object: {exc}"
            refusals.append(Refusal(at, Reason.BAD_JSON.code, why, item))
        except _BROKEN as exc:
            refusals.append(Refusal(at, Reason.BAD_JSON.code, f"not JSON: {exc}", item))
    return lanes, refusals
