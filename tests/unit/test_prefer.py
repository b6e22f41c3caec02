"""`Prefer: wait`: the syntax of RFC 7240, and what is made of the number."""

from __future__ import annotations

import time

import pytest
from multidict import CIMultiDict

from datapipe.http.prefer import wait_seconds


def asked(*values: str) -> int | None:
    return wait_seconds(CIMultiDict([("Prefer", value) for value in values]))


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        (["wait=10"], 10),
        (["wait=0"], 0),
        (["wait=007"], 7),
        (["wait=25"], 25),
        (["wait=26"], 25),
        (["wait=" + "9" * 8000], 25),
        (["WAIT=3"], 3),
        (['wait="10"'], 10),
        (["  wait =\t10 "], 10),
        (["respond-async, wait=10"], 10),
        (["respond-async,wait=10,handling=lenient"], 10),
        (["wait=10; a=b;c"], 10),
        (["respond-async", "wait=10"], 10),
        (["wait=10, wait=5"], 10),  # the first counts (RFC 7240, section 2)
        (["wait=10", "wait=5"], 10),
        (['x="a, wait=5", wait=10'], 10),
        (['x="a\\", wait=5", wait=10'], 10),
        ([',, wait=10,'], 10),
        (["wait=soon, wait=5"], 5),
    ],
)  # fmt: skip
def test_what_is_asked_for(values: list[str], seconds: int) -> None:
    assert asked(*values) == seconds


@pytest.mark.parametrize(
    "value",
    ["", "wait", "wait=", 'wait=""', "wait=-1", "wait=+1", "wait=1.5", "wait=1e1", "wait=1 0",
     "wait=0x5", "wait=ten", 'wait="10', "wait=10\"", "wait=\u0661", "await=10", "wait-=10",
     "x; wait=10", 'x="wait=10"', 'x="wait=10', "respond-async", "wait 10", "wait:10"],
)  # fmt: skip
def test_what_is_malformed_or_something_else_is_ignored(value: str) -> None:
    assert asked(value) is None


def test_none() -> None:
    assert wait_seconds(CIMultiDict({"X-Prefer": "wait=1"})) is None


@pytest.mark.parametrize(
    "piece", ['"', '\\"', '"\\"', "a", ",", " ", "wait ", "wait=1", "\\", '"a"']
)
def test_no_header_takes_long(piece: str) -> None:
    began = time.perf_counter()
    asked(*[piece * (8000 // len(piece))] * 7)
    assert time.perf_counter() - began < 0.1
