"""`traceparent`: what is taken over, and what is ignored."""

from __future__ import annotations

import pytest
from multidict import CIMultiDict

from datapipe.http.traceparent import trace_ids

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    "value", [GOOD, f"00-{TRACE}-{SPAN}-00", f"01-{TRACE}-{SPAN}-09", f"fe-{TRACE}-{SPAN}-01-more"]
)
def test_a_trace(value: str) -> None:
    assert trace_ids(CIMultiDict(TraceParent=value)) == {"trace_id": TRACE, "span_id": SPAN}


@pytest.mark.parametrize(
    "value",
    ["", "00", GOOD[:-1], GOOD.upper(), GOOD.replace("-", "_"), f"ff{GOOD[2:]}", f"0{GOOD}",
     f"{GOOD}-more", f"{GOOD}1", f"01{GOOD[2:]}more", f" {GOOD}", GOOD.replace(TRACE, "0" * 32),
     GOOD.replace(SPAN, "0" * 16), GOOD.replace("a", "g"), f"{GOOD}, {GOOD}", "x" * 8000],
)  # fmt: skip
def test_what_is_malformed_is_ignored(value: str) -> None:
    assert trace_ids(CIMultiDict(traceparent=value)) == {}


def test_two_of_them_are_none() -> None:
    assert trace_ids(CIMultiDict([("traceparent", GOOD), ("Traceparent", GOOD)])) == {}
    assert trace_ids(CIMultiDict()) == {}
