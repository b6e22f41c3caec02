"""A short run of what `make torture` does for a minute, and a look whether it would see."""

from __future__ import annotations

import pytest

from datapipe.http import heads
from datapipe.http.heads import Head
from tests.fault.pipelines import run


def test_pipelines_cut_anywhere_are_answered_alike_by_both_ways(seed: int) -> None:
    found = run(0, seed, 200)
    assert found.pipelines == 201
    assert {"200", "207", "400"} <= set(found.answers), found
    assert found.accepted > 50


def test_a_length_that_is_read_otherwise_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    parse = heads._parse

    def off_by_one(head: bytes) -> Head | None:
        found = parse(head)
        return found and found._replace(length=max(found.length - 1, 0))

    monkeypatch.setattr(heads, "_parse", off_by_one)
    with pytest.raises(AssertionError) as caught:
        run(0, 0, 50)
    assert any("run(0, 0, 50)" in note for note in caught.value.__notes__)
