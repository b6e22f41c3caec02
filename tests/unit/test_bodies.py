"""The way from a body to rows: what is one event, what is a batch, and which error is told."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.errors import EventRejected
from datapipe.events.registry import Registry, load_registry
from datapipe.events.segment import Chunk
from datapipe.http.elements import elements as cut_elements
from datapipe.http.parse import Parsed, Parser
from datapipe.http.parts import PART_BYTES
from datapipe.settings import Settings

AT = "2026-11-22 12:00:00.123456"
GOOD = b'{"event_name":"install","user_id":1,"timestamp":2}'
ROW = f"1\t2\t{AT}\n".encode()


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry(Settings())


async def read(registry: Registry, body: bytes, *, keyed: bool = False, most: int = 100) -> Parsed:
    return await Parser(registry, most).parse(body, AT, ("key", "body") if keyed else None)


def part(chunk: Chunk) -> int:
    assert chunk.claim is not None
    return chunk.claim[2]


def total(parsed: Parsed) -> int:
    return sum(chunk.events for chunk in parsed.chunks) + len(parsed.errors)


@pytest.mark.parametrize(
    "body",
    [GOOD, b" \r\n" + GOOD + b"\n", json.dumps(json.loads(GOOD), indent=2).encode()],
    ids=["plain", "white space around", "over several lines"],
)
async def test_one_object_is_one_event(registry: Registry, body: bytes) -> None:
    parsed = await read(registry, body)
    assert (parsed.batch, total(parsed), parsed.errors) == (False, 1, [])
    assert [rows.data for rows in parsed.chunks] == [ROW]


@pytest.mark.parametrize(
    "body",
    [
        b"[" + GOOD + b"," + GOOD + b"]",
        b"\n [ " + GOOD + b" , " + GOOD + b" ] \n",
        GOOD + b"\n" + GOOD,
        GOOD + b"\r\n\r\n  \n" + GOOD + b"\r\n",
    ],
    ids=["array", "array with white space", "lines", "lines with CRLF and blank ones"],
)
async def test_a_batch(registry: Registry, body: bytes) -> None:
    parsed = await read(registry, body)
    assert (parsed.batch, total(parsed), parsed.errors) == (True, 2, [])
    assert [(rows.data, list(rows.indexes)) for rows in parsed.chunks] == [(ROW * 2, [0, 1])]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", 2), (b" \n", 2), (b"[]", 2), (b"[ ]", 2), (b"foo", 3), (b"\xff", 3),
        (b"\xef\xbb\xbf" + GOOD, 3), (b"[" + GOOD, 3), (b"[" + GOOD + b",]", 3), (b"5", 3),
        (b"null", 3), (b'"x"', 3), (b"[" * 10_000 + b"]" * 10_000, 3), (GOOD + GOOD, 3),
        (b"{}", 4), (b'{"event_name":5}', 5), (b'{"event_name":" install"}', 7),
        (b'{"event_name":"install","user_id":1}', 4),
        (b'{"event_name":"install","user_id":1.0,"timestamp":2}', 5),
        (b'{"event_name":"install","user_id":true,"timestamp":2}', 5),
        (b'{"event_name":"install","user_id":9223372036854775808,"timestamp":2}', 5),
        (b'{"event_name":"install","user_id":NaN,"timestamp":2}', 3),
    ],
)  # fmt: skip
async def test_what_a_single_body_is_refused_for(
    registry: Registry, body: bytes, code: int
) -> None:
    with pytest.raises(EventRejected) as refused:
        await read(registry, body)
    assert refused.value.reason.code == code


async def test_a_bad_event_of_a_batch_costs_itself_only(registry: Registry) -> None:
    for body in (b"[%b,5 , {},%b]", b"%b\n5\n{}\n%b"):
        parsed = await read(registry, body % (GOOD, GOOD))
        assert total(parsed) == 4
        assert [(rows.data, list(rows.indexes)) for rows in parsed.chunks] == [(ROW * 2, [0, 3])]
        assert [(index, error.reason.code) for index, error in parsed.errors] == [(1, 3), (2, 4)]


async def test_a_broken_line_costs_itself_only(registry: Registry) -> None:
    parsed = await read(registry, GOOD + b'\n{"event_name":\n\xff\n' + GOOD)
    assert [(index, error.reason.code) for index, error in parsed.errors] == [(1, 3), (2, 3)]
    assert [rows.data for rows in parsed.chunks] == [ROW * 2]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text() | st.text(r'"\[]{}, ', max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)  # fmt: skip
SEPARATORS = [(",", ":"), (" ,\n", " :\t"), (", \r", ": ")]


@given(st.lists(JSON, max_size=8), st.sampled_from([None, 1]), st.sampled_from(SEPARATORS))
def test_an_array_is_taken_apart_at_the_right_places(
    elements: list[Any], indent: int | None, separators: tuple[str, str]
) -> None:
    for ascii in (True, False):
        text = json.dumps(elements, ensure_ascii=ascii, indent=indent, separators=separators)
        body = text.encode()
        raws = [raw for raw in cut_elements(body + b" \n") if raw is not None]
        assert raws == [bytes(raw) for raw in msgspec.json.decode(body, type=list[msgspec.Raw])]
        assert [json.loads(raw) for raw in raws] == json.loads(body)


async def test_others_get_a_turn_while_many_brackets_are_passed_over(registry: Registry) -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    parsed = await read(registry, b"[" + GOOD + b',{"x":[' + b"{}," * 100_000 + b"1]}]")
    task.cancel()
    assert [error.reason.code for _, error in parsed.errors] == [4]
    assert turns > 20


@pytest.mark.parametrize(
    "body", [b"[" + b"1," * 101 + b"1]", b"\n".join([GOOD] * 101), b"[" + b"[]," * 101 + b"1]"]
)
async def test_more_events_than_allowed(registry: Registry, body: bytes) -> None:
    with pytest.raises(EventRejected) as refused:
        await read(registry, body)
    assert (refused.value.reason.code, refused.value.status) == (6, 413)


async def test_parts_depend_on_the_body_alone(registry: Registry) -> None:
    events = [{"event_name": "install", "user_id": i, "timestamp": 2} for i in range(1000)]
    array = json.dumps(events).encode()
    lines = b"\n".join(json.dumps(event).encode() for event in events)
    with_a_bad_one = array[:-1] + b" , 5 ]"
    cuts = []
    for body in (array, lines, with_a_bad_one):
        parsed = await read(registry, body, keyed=True, most=2000)
        cuts.append([(part(rows), list(rows.indexes)) for rows in parsed.chunks])
    assert cuts[0] == cuts[1] == cuts[2]
    wanted: dict[int, list[int]] = {}
    start = 0
    for index, event in enumerate(events):
        wanted.setdefault(start // PART_BYTES, []).append(index)
        start += len(json.dumps(event))
    assert cuts[0] == list(wanted.items())


def install(user: int, **more: Any) -> dict[str, Any]:
    return {"event_name": "install", "user_id": user, "timestamp": 2, **more}


async def test_a_part_says_which_events_of_its_name_were_rejected(registry: Registry) -> None:
    """What has no name counts nowhere, and each name and each part of the body by itself."""
    padding = "x" * 300
    events: list[Any] = [
        install(0), 5, {}, {"event_name": 3}, install(1.5), {**install(2), "event_name": "other"},
        {"event_name": "purchase"}, install(3, more=padding), install("bad"), install(5),
    ] * 40  # fmt: skip
    array = json.dumps(events).encode()
    lines = b"\n".join(json.dumps(event).encode() for event in events)
    for body in (array, lines):
        parsed = await read(registry, body, keyed=True, most=2000)
        wanted: dict[int, str] = {}
        start = 0
        for event in events:
            if isinstance(event, dict) and event.get("event_name") == "install":
                good = isinstance(event["user_id"], int)
                number = start // PART_BYTES
                wanted[number] = ("0" if good else "1") + wanted.get(number, "")
            start += len(json.dumps(event))
        assert len(wanted) > 1
        found = {part(chunk): f"{int(chunk.lacks, 16):0{len(wanted[part(chunk)])}b}"
                 for chunk in parsed.chunks}  # fmt: skip
        assert found == wanted
        assert {chunk.name for chunk in parsed.chunks} == {""}
        unkeyed = await read(registry, body, most=2000)
        assert [chunk.lacks for chunk in unkeyed.chunks] == [""]


async def test_parts_lack_nothing_where_nothing_was_rejected(registry: Registry) -> None:
    purchase = {**install(1), "event_name": "purchase", "sku": "tea"}
    body = json.dumps([install(1), purchase, 5, install(2)]).encode()
    parsed = await read(registry, body, keyed=True)
    assert [(chunk.lane, part(chunk), chunk.lacks) for chunk in parsed.chunks] == [
        ("install", 0, ""), ("purchase", 0, ""),
    ]  # fmt: skip


async def test_parts_of_unknown_types_have_their_event_names() -> None:
    """So the same event is in the same part once its type is registered."""
    keeping = Parser(load_registry(Settings(unknown_events="keep")), 100)
    events = [
        install(0), {"event_name": "a"}, {"event_name": "b"}, {"event_name": "a", "x": "\0"},
        {"event_name": "No form"}, {"event_name": "a"},
    ]  # fmt: skip
    body = json.dumps(events).encode()
    parsed = await keeping.parse(body, AT, ("key", "body"))
    assert [(chunk.lane, chunk.name, chunk.lacks, chunk.events) for chunk in parsed.chunks] == [
        ("install", "", "", 1), ("datapipe_unknown", "a", "2", 2), ("datapipe_unknown", "b", "", 1),
    ]  # fmt: skip
    parsed = await keeping.parse(body, AT, None)
    assert [(chunk.lane, chunk.events) for chunk in parsed.chunks] == [
        ("install", 1), ("datapipe_unknown", 3),
    ]  # fmt: skip


async def test_whatever_a_part_lacks_fits_into_a_ledger_row(registry: Registry) -> None:
    """Of MariaDB, which reads 255 characters."""
    least = Parser(load_registry(Settings(events={"a": {"n": "int?"}})), 2000)
    events = [b'{"event_name":"a"}'] + [b'{"event_name":"a","n":""}'] * 2 + [b'{"event_name":"a"}']
    body = b"\n".join(events[:1] + events * 300)
    parsed = await least.parse(body, AT, ("key", "body"))
    assert 100 < max(len(chunk.lacks) for chunk in parsed.chunks) <= 255
    assert PART_BYTES / len(events[0]) / 4 + 1 <= 255


async def test_parts_of_a_small_body_are_one(registry: Registry) -> None:
    parsed = await read(registry, b"[" + GOOD + b"," + GOOD + b"]", keyed=True)
    assert [part(rows) for rows in parsed.chunks] == [0]


@pytest.mark.parametrize("keyed", [False, True])
async def test_a_blank_line_does_not_make_up_for_one_that_holds_two(
    registry: Registry, keyed: bool
) -> None:
    other = GOOD.replace(b"1", b"7")
    rest = (GOOD + b"\n" + other + b"\n") * 200  # more than one part
    parsed = await read(registry, GOOD + other + b"\n\n" + rest, keyed=keyed, most=1000)
    assert (parsed.batch, total(parsed)) == (True, 401)
    assert [(index, error.reason.code) for index, error in parsed.errors] == [(0, 3)]
    assert sum(chunk.events for chunk in parsed.chunks) == 400


async def test_a_line_that_holds_two_is_no_event(registry: Registry) -> None:
    parsed = await read(registry, GOOD + GOOD + b"\n" + GOOD)
    assert [(index, error.reason.code) for index, error in parsed.errors] == [(0, 3)]
    assert total(parsed) == 2
