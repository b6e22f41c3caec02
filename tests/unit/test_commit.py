"""Sealing: chunks of many POSTs become segments that are full, whole and complete."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from datapipe.events.segment import Chunk
from datapipe.events.types import Column
from datapipe.pipeline.group_commit import seal

COLUMNS = (Column("a", "text"),)


@st.composite
def chunks(draw: st.DrawFn) -> list[Chunk]:
    made = []
    for number in range(draw(st.integers(1, 12))):
        rows = draw(st.lists(st.integers(1, 60), min_size=1, max_size=12))
        data = b"".join(b"x" * (size - 1) + b"\n" for size in rows)
        claim = ("c", "b", number) if draw(st.booleans()) else None
        made.append(Chunk(draw(st.sampled_from("pq")), COLUMNS, data, len(rows), claim))
    return made


@given(chunks(), st.integers(1, 200))
def test_segments_hold_all_rows_within_bounds(given_chunks: list[Chunk], max_bytes: int) -> None:
    segments = seal(given_chunks, max_bytes)
    for lane in "pq":
        wanted = b"".join(chunk.data for chunk in given_chunks if chunk.lane == lane)
        assert b"".join(s.data for s in segments if s.lane == lane) == wanted
    for segment in segments:
        assert segment.events == segment.data.count(b"\n") > 0
        whole = [segment.data[part.start : part.end] for part in segment.parts]
        single = segment.events == 1 or whole == [segment.data]
        assert len(segment.data) <= max_bytes or single
    parts = [(s.lane, p.number, s.data[p.start : p.end]) for s in segments for p in s.parts]
    keyed = [(c.lane, c.claim[2], c.data) for c in given_chunks if c.claim]
    assert sorted(parts) == sorted(keyed)


def test_rows_are_cut_so_that_segments_are_full() -> None:
    posts = [Chunk("p", COLUMNS, b"123456789\n" * 60, 60) for _ in range(10)]
    assert [len(segment.data) for segment in seal(posts, 1000)] == [1000] * 6
