"""Pieces: rows go to a database in pieces, so that a refusal makes us send little again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from datapipe.sinks.transaction import Rows

PIECE_BYTES = 2_097_152


def pieces(rows: Iterable[Rows]) -> Iterator[list[Rows]]:
    """Together at least so many bytes, but for the last one."""
    piece: list[Rows] = []
    size = 0
    for each in rows:
        piece.append(each)
        size += len(each.data)
        if size >= PIECE_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def lines(rows: Sequence[Rows]) -> list[Rows]:
    """One row each."""
    return [
        Rows(each.id, line + b"\n") for each in rows for line in bytes(each.data).split(b"\n")[:-1]
    ]
