"""Bodies meant to hurt: nothing of them is an internal server error, and no good event is lost."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import re
import zlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.postgres import Postgres
from tests.service import Service
from tests.wire import WAYS, ask, crash, lines, post, running

# one type with a column of every kind, each of them nullable
KINDS = ("int", "float", "str", "bool", "datetime", "date", "Decimal", "UUID", "dict", "list")
EVERYTHING = {"n": "int", **{f"a_{kind.lower()}": f"{kind}?" for kind in KINDS}}

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=WAYS)
async def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, database_url: str
) -> AsyncIterator[Service]:
    async with running(
        tmp_path_factory.mktemp("bad"), database_url=database_url,
        events={"everything": EVERYTHING}, **WAYS[request.param],
    ) as service:  # fmt: skip
        yield service
        assert not service.logged("fault"), service.logged("fault")[0]["exception"]
        assert (await service.status())["books"]["dead"] == 0


@pytest.fixture
def stored(service: Service, database_url: str) -> Callable[..., Any]:
    """Loads what waits; then the values of one column for these `n`, in their order."""

    async def values(column: str, numbers: range, table: str = "everything") -> list[Any]:
        assert (await service.load())["failed"] == {}
        key = "n" if table == "everything" else "user_id"
        sql = f"SELECT {column} FROM {table} WHERE {key} BETWEEN %s AND %s ORDER BY {key}"
        rows = Postgres.execute(database_url, sql, numbers[0], numbers[-1])
        return [value for (value,) in rows]

    return values


@pytest.fixture
def numbers() -> Callable[[int], range]:
    """So many numbers that no other test has."""

    def take(count: int) -> range:
        start = uuid4().int >> 66
        return range(start, start + count)

    return take


def everything(n: int, **values: object) -> dict[str, Any]:
    return {"event_name": "everything", "n": n, **values}


# --- what must be refused, alone and among good ones ---


def event(message: bytes = b'"m"', user_id: bytes = b"1") -> bytes:
    """A crash report with these JSON texts in it."""
    return b'{"event_name": "crash_report", "user_id": %b, "timestamp": 1, "message": %b}' % (
        user_id, message,
    )  # fmt: skip


def in_list(value: bytes) -> bytes:
    return b'{"event_name": "everything", "n": 1, "a_list": %b}' % value


def in_dict(value: bytes) -> bytes:
    return b'{"event_name": "everything", "n": 1, "a_dict": %b}' % value


NOT_JSON = {
    "a tab as it is": event(b'"a\tb"'),
    "0x1f as it is": event(b'"a\x1fb"'),
    "U+0000 as it is": event(b'"a\0b"'),
    "an unknown escape": event(b'"a\\qb"'),
    "half an escape": event(b'"a\\u12"'),
    "an octal escape": event(b'"\\012"'),
    "not UTF-8 in text": event(b'"\xff"'),
    "a surrogate as UTF-8": event(b'"\xed\xa0\x80"'),
    "overlong UTF-8": event(b'"\xc0\x80"'),
    "UTF-8 cut off": event(b'"\xf0\x9f\x98"'),
    "beyond U+10FFFF": event(b'"\xf4\x90\x80\x80"'),
    "not UTF-8 in an ignored key": event()[:-1] + b', "x": "\xff"}',
    "not UTF-8 in a dict": in_dict(b'{"a": "\xff"}'),
    "not UTF-8 in a key": in_dict(b'{"\xff": 1}'),
    "NaN": event(user_id=b"NaN"),
    "Infinity": event(user_id=b"Infinity"),
    "-Infinity": event(user_id=b"-Infinity"),
    "NaN in a list": in_list(b"[NaN]"),
    "hexadecimal": event(user_id=b"0x10"),
    "a leading zero": event(user_id=b"01"),
    "a plus": event(user_id=b"+1"),
    "a bare point": event(user_id=b"1."),
    "an underline": event(user_id=b"1_000"),
    "a list not closed": in_list(b"[1"),
    "undefined": event(b"undefined"),
    "BOM": b"\xef\xbb\xbf" + event(),
    "10,000 levels": b"[" * 10_000,
    "10,000 objects": b'{"a":' * 10_000,
    "10,000 levels, closed, in a list": in_list(b"[" * 10_000 + b"]" * 10_000),
    "10,000 levels, closed, in a dict": in_dict(b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    "10,000 levels in an ignored key": event()[:-1] + b', "x": ' + b"[" * 10_000 + b"]" * 10_000
    + b"}",
}  # fmt: skip
BAD_VALUE = {
    "2**63": event(user_id=b"9223372036854775808"),
    "-2**63-1": event(user_id=b"-9223372036854775809"),
    "2**64": event(user_id=b"18446744073709551616"),
    "5,000 digits": event(user_id=b"9" * 5000),
    "1e3": event(user_id=b"1e3"),
    "1E400": event(user_id=b"1E400"),
    "-0.0": event(user_id=b"-0.0"),
    "U+0000": event(b'"a\\u0000b"'),
    "U+0000 in a dict": in_dict(b'{"a": "\\u0000"}'),
    "U+0000 in a key": in_dict(b'{"a\\u0000": 1}'),
    "U+0000 deep in a dict": in_dict(b'{"a": ' * 60 + b'[{"\\u0000": 1}]' + b"}" * 60),
    "U+0000 deep in a list": in_list(b"[" * 60 + b'"\\u0000"' + b"]" * 60),
    "a list for a dict": in_dict(b"[]"),
    "a dict for a list": in_list(b"{}"),
    "text for a dict": in_dict(b'"{}"'),
}
# these can't be stored either; whether they are no JSON or a wrong value is a matter of taste
EITHER = {
    "lone high surrogate": event(b'"\\ud800"'),
    "lone low surrogate": event(b'"\\udc00"'),
    "surrogates the wrong way round": event(b'"\\udc00\\ud800"'),
    "lone surrogate in a dict": in_dict(b'{"a": "\\ud83d"}'),
    "lone surrogate in a key": in_dict(b'{"\\ud83d": 1}'),
    "lone surrogate in a list": in_list(b'["\\ud83d\\u0041"]'),
}
ALL_BAD = (
    [(name, body, {3}) for name, body in NOT_JSON.items()]
    + [(name, body, {5}) for name, body in BAD_VALUE.items()]
    + [(name, body, {3, 5}) for name, body in EITHER.items()]
)


@pytest.mark.parametrize(("name", "body", "codes"), ALL_BAD, ids=[bad[0] for bad in ALL_BAD])
async def test_refused(service: Service, name: str, body: bytes, codes: set[int]) -> None:
    before = (await service.status())["books"]["accepted"]
    for packed in (body, b"[" + body + b"]"):
        answer = await ask(service, post(packed))
        assert (answer.status, answer.code in codes) == (400, True), answer.body
    status, answered = await service.post(lines(crash(), body, crash()))
    assert (status, answered["accepted"], answered["rejected"]) == (207, 2, 1)
    assert answered["errors"][0]["index"] == 1
    assert answered["errors"][0]["status_code"] in codes
    assert (await service.status())["books"]["accepted"] == before + 2


async def test_no_good_event_is_lost_among_all_bad_ones(
    service: Service, stored: Any, numbers: Any
) -> None:
    users = numbers(len(ALL_BAD) + 1)
    mixed = [crash("good", users[0])]
    for (_, body, _), user in zip(ALL_BAD, users[1:], strict=True):
        mixed += [body, crash("good", user)]
    status, answer = await service.post(lines(*mixed))
    assert (status, answer["accepted"], answer["rejected"]) == (207, len(users), len(ALL_BAD))
    assert await stored("user_id", users, "crash_report") == list(users)


CUT = lines(crash("\U0001f600 \\ \t \u00e9"), everything(1, a_dict={"a": [1, {"b": "\u00e9"}]}))


async def test_a_body_cut_off_anywhere(service: Service) -> None:
    whole = CUT[: CUT.index(b"\n")]
    for body in (whole, b"[" + whole + b"]"):
        for end in range(1, len(body)):
            status, answer = await service.post(body[:end])
            assert (status, answer["status_code"]) == (400, 3), body[:end]
    packed = zlib.compress(CUT)
    for end in range(1, len(packed)):
        status, answer = await service.post(packed[:end], headers={"Content-Encoding": "deflate"})
        assert (status, answer["status_code"]) == (400, 3), end


# --- what must not cost memory or time ---


def peak_mib(service: Service) -> float:
    text = Path(f"/proc/{service.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    assert found
    return int(found[1]) / 1024


MiB = 1 << 20
HUGE = {
    "gigabytes in one member": (
        "gzip", lambda: gzip.compress(b" " * (256 * MiB), 1), 413, 6,
    ),
    "gigabytes in many members": (
        "gzip", lambda: gzip.compress(b" " * (16 * MiB)) * 250, 413, 6,
    ),
    "members with nothing in them": (
        "gzip", lambda: gzip.compress(b"") * 400_000, 400, 2,
    ),
    "[1,1,...]": ("identity", lambda: b"[" + b"1," * (4 * MiB - 2) + b"1]", 413, 6),
    "[{},{},...]": ("identity", lambda: b"[" + b"{}," * (2 * MiB) + b"{}]", 413, 6),
    "[[],[],...]": ("identity", lambda: b"[" + b"[]," * (2 * MiB) + b"[]]", 413, 6),
    "1 on each line": ("identity", lambda: b"1\n" * (4 * MiB - 1), 413, 6),
    "{} on each line": ("identity", lambda: b"{}\n" * (2 * MiB), 413, 6),
    "blank lines": ("identity", lambda: b"\n" * (8 * MiB), 400, 2),
    "blank lines in between": (
        "identity", lambda: lines(crash()) + b"\n" * (7 * MiB) + lines(crash()), 200, 0,
    ),
    "[[[[": ("identity", lambda: b"[" * (8 * MiB), 400, 3),
    '{"a":{"a":': ("identity", lambda: b'{"a":' * MiB, 400, 3),
    "one long text": ("identity", lambda: event(b'"' + b"x" * (8 * MiB - 200) + b'"'), 400, 6),
    "one long list": (
        "identity", lambda: in_list(b"[" + b"1," * (4 * MiB - 100) + b"1]"), 400, 6,
    ),
    "one long ignored list": (
        "identity", lambda: event()[:-1] + b', "x": [' + b"1," * (4 * MiB - 100) + b"1]}", 200, 0,
    ),
    "many ignored keys": (
        "identity",
        lambda: event()[:-1] + b"".join(b',"%d":0' % i for i in range(500_000)) + b"}", 200, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
async def test_huge(service: Service, name: str) -> None:
    encoding, make, status, code = HUGE[name]
    body = make()
    await service.post(crash())
    before = peak_mib(service)
    slowest = 0.0

    async def others() -> None:
        """What the loop does meanwhile for others."""
        nonlocal slowest
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            assert (await service.post(crash()))[0] == 200
            slowest = max(slowest, loop.time() - started)

    meanwhile = asyncio.create_task(others())
    answer = await ask(service, post(body, f"Content-Encoding: {encoding}"))
    meanwhile.cancel()
    await asyncio.wait([meanwhile])
    assert meanwhile.cancelled(), "others were answered"
    assert (answer.status, answer.code) == (status, code)
    assert peak_mib(service) - before < 100, "MiB for 8 MiB of body"
    assert slowest < 2.0, "seconds that others waited"


# --- what is taken is stored as it was sent ---

TEXTS = [
    "", " ", "\t", "\n", "\r", "\r\n", "\\", "\\\\", "\\.", "\\N", "\\n", "\\t", "\\x41", "\\101",
    "a\\", "\\\n", "\n\\.\n", "\n\\.", "\\.\n", "a\tb\nc\rd\\e", "\x1d", "\x1e", "\x1f",
    "\x1d\x1e\x1f", "a\x1db\x1ec\x1fd", "\x01\x02\x08\x0b\x0c\x0e\x1a\x1b\x1c\x7f", "\u0080\u009f",
    "\u00a0\u2028\u2029\ufeff", "\ufffe\uffff\ufffd", "\U0001f600", "\U0010ffff", "e\u0301",
    "\u202eabc", "NULL", "null", "'; DROP TABLE crash_report; --", '"', "''", "$$", "%s %(a)s {}",
    "{\"a\": 1}", "\u0130\u0131\u00df", "\x1dN", "x" * 2000, "\u20ac" * 600, "\x1e" * 500,
]  # fmt: skip


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("form", ["one by one", "array", "lines"])
async def test_text_is_stored_as_sent(
    service: Service, stored: Any, numbers: Any, form: str, ascii_only: bool
) -> None:
    ns = numbers(len(TEXTS))
    events = [crash(text, n) for n, text in zip(ns, TEXTS, strict=True)]
    bodies = [json.dumps(each, ensure_ascii=ascii_only) for each in events]
    if form == "array":
        bodies = [f"[{','.join(bodies)}]"]
    elif form == "lines":
        bodies = ["\n".join(bodies)]
    for body in bodies:
        status, answer = await service.post(body)
        assert (status, answer["status_code"]) == (200, 0), body
    assert await stored("message", ns, "crash_report") == TEXTS


@pytest.mark.parametrize("ascii_only", [True, False])
async def test_text_in_json_columns_is_stored_as_sent(
    service: Service, stored: Any, numbers: Any, ascii_only: bool
) -> None:
    ns = numbers(len(TEXTS))
    dicts = [{text: text, "deep": [{"er": [text]}]} if len(text) < 50 else {} for text in TEXTS]
    lists = [[text, {"": text}] if len(text) < 50 else [] for text in TEXTS]
    events = [
        everything(n, a_dict=one, a_list=other, a_str=text if len(text) < 50 else None)
        for n, one, other, text in zip(ns, dicts, lists, TEXTS, strict=True)
    ]
    status, answer = await service.post(json.dumps(events, ensure_ascii=ascii_only))
    assert (status, answer.get("accepted")) == (200, len(events)), answer
    assert await stored("a_dict", ns) == dicts
    assert await stored("a_list", ns) == lists
    assert await stored("a_str", ns) == [text if len(text) < 50 else None for text in TEXTS]


ODD_JSON = [
    "{}", "[]", " { } ", "[ ]", "[null]", "[true, false]", "[0, -0, 1.0, 1.50, 1e5, 1E-5]",
    "[18446744073709551616, -9223372036854775809, 123456789012345678901234567890.123456789]",
    '{"a": 1, "a": 2}', '{"\\u0061": 1}', "[" * 500 + "]" * 500, "[\n1,\r\n\t2 ]",
    '["\\u00e9", "\\ud83d\\ude00", "\\/"]', '{"": {"": [[]]}}', "[1e300]", '["\\\\u0000"]',
    '{"event_name": "nope"}',
]  # fmt: skip


def exactly(text: str) -> Any:
    return json.loads(text, parse_float=Decimal, parse_int=Decimal)


async def test_odd_json_is_stored_as_sent(service: Service, stored: Any, numbers: Any) -> None:
    ns = numbers(len(ODD_JSON))
    for n, text in zip(ns, ODD_JSON, strict=True):
        column = "a_dict" if text.strip().startswith("{") else "a_list"
        # as sent, line ends and all: json.dumps would tidy it up
        body = f'{{"event_name": "everything", "n": {n}, "{column}": {text}}}'
        status, answer = await service.post(body)
        assert (status, answer["status_code"]) == (200, 0), text
    texts = await stored("coalesce(a_dict, a_list)::text", ns)
    assert [exactly(text) for text in texts] == [exactly(text) for text in ODD_JSON]


async def test_of_a_key_sent_twice_the_last_counts(
    service: Service, stored: Any, numbers: Any
) -> None:
    (n,) = ns = numbers(1)
    body = event(b'"first", "message": "last"', b'5, "user_id": %d' % n)
    assert await service.post(body) == (200, {"status_code": 0, "status_message": "ok"})
    assert await stored("message", ns, "crash_report") == ["last"]
    body = body.replace(b'"crash_report"', b'"install", "event_name": "crash_report"')
    status, _ = await service.post(body)
    assert status in (200, 400)


# --- and anything else one can think of ---

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats()
    | st.text(max_size=20)
)  # fmt: skip
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
FITTING: dict[str, st.SearchStrategy[Any]] = {
    "int": st.integers(-(2**63) - 1, 2**63),
    "float": st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**64), 2**64),
    "str": st.text(max_size=100),
    "bool": st.booleans(),
    "datetime": (
        st.datetimes(timezones=st.none() | st.just(UTC) | st.timezones()).map(datetime.isoformat)
    ),
    "date": st.dates().map(date.isoformat),
    "Decimal": st.decimals(allow_nan=False, allow_infinity=False).map(str) | st.integers(),
    "UUID": st.uuids().map(str),
    "dict": st.dictionaries(st.text(max_size=9), JSON, max_size=4),
    "list": st.lists(JSON, max_size=4),
}
EVENTS = st.fixed_dictionaries(
    {}, optional={f"a_{kind.lower()}": FITTING[kind] | st.none() | JSON for kind in KINDS}
)


def moment(text: str) -> datetime:
    value = datetime.fromisoformat(text)
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def plain(value: Any) -> Any:
    """JSON with its numbers as exact ones, `true` apart from 1."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return (type(value).__name__, value)
    return Decimal(str(value))


def wanted(kind: str, value: Any) -> Any:
    """What the column must hold for a value as sent."""
    if value is None:
        return None
    if kind in ("dict", "list"):
        return plain(value)
    convert: dict[str, Callable[[Any], Any]] = {
        "float": float, "datetime": moment, "date": date.fromisoformat, "UUID": UUID,
        "Decimal": lambda v: Decimal(repr(v) if isinstance(v, float) else v),
    }  # fmt: skip
    return convert.get(kind, lambda v: v)(value)


def found(kind: str, value: Any) -> Any:
    """What the column holds; times and UUIDs come as text, which any year can be."""
    if value is None or kind in ("int", "float", "str", "bool"):
        return value
    if kind in ("dict", "list"):
        return plain(exactly(value))
    if kind == "datetime":
        return datetime.fromisoformat(value)
    return {"date": date.fromisoformat, "UUID": UUID, "Decimal": Decimal}[kind](value)


@settings(
    max_examples=60, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(batch=st.lists(EVENTS, min_size=1, max_size=12))
async def test_what_is_accepted_is_in_the_table(
    service: Service, database_url: str, batch: list[dict[str, Any]]
) -> None:
    start = uuid4().int >> 66
    sent = {start + i: values for i, values in enumerate(batch)}
    status, answer = await service.post(lines(*(everything(n, **v) for n, v in sent.items())))
    assert status in (200, 207, 400), answer
    assert {error["status_code"] for error in answer.get("errors", [])} <= {3, 5, 6}
    refused = {start + error["index"] for error in answer.get("errors", [])}
    if status == 400:
        refused = set(sent)
    assert (await service.load())["failed"] == {}
    columns = [f"a_{kind.lower()}" for kind in KINDS]
    texts = ("datetime", "date", "Decimal", "UUID", "dict", "list")
    select = [f"{c}::text" if k in texts else c for k, c in zip(KINDS, columns, strict=True)]
    sql = (
        f"SET timezone = 'UTC'; SELECT n, {', '.join(select)} FROM everything"
        " WHERE n BETWEEN %s AND %s"
    )
    rows = {n: values for n, *values in Postgres.execute(database_url, sql, start, start + 99)}
    assert set(rows) == set(sent) - refused
    for n, values in rows.items():
        for kind, column, value in zip(KINDS, columns, values, strict=True):
            expected = wanted(kind, sent[n].get(column))
            if kind == "float" and expected is not None:
                assert math.isclose(value, expected, rel_tol=0, abs_tol=0), (kind, sent[n])
            else:
                assert found(kind, value) == expected, (kind, sent[n])


SHORT_TIMES = {
    "2026-11-25": datetime(2026, 11, 25, tzinfo=UTC),
    "2026-11-25T12:30": datetime(2026, 11, 25, 12, 30, tzinfo=UTC),
    "2026-11-25 12:30+02": datetime(2026, 11, 25, 10, 30, tzinfo=UTC),
    "2026-11-25T12:30:05Z": datetime(2026, 11, 25, 12, 30, 5, tzinfo=UTC),
}


async def test_times_of_iso_8601_are_rows(service: Service, stored: Any, numbers: Any) -> None:
    """Singly, and in a batch among those that are read the fast way."""
    taken = numbers(2 * len(SHORT_TIMES) + 1)
    events = [
        everything(n, a_datetime=sent)
        for n, sent in zip(taken, [*SHORT_TIMES, *SHORT_TIMES], strict=False)
    ]
    singly, batch = events[: len(SHORT_TIMES)], events[len(SHORT_TIMES) :]
    for each in singly:
        assert (await service.post(each))[0] == 200
    wrong = everything(taken[-1], a_datetime="25.11.2026")
    status, answer = await service.post([*batch, wrong])
    assert (status, answer["accepted"]) == (207, len(batch))
    assert "such as 2026-11-22T12:00:00.5Z, " in answer["errors"][0]["status_message"]
    assert await stored("a_datetime", taken) == [*SHORT_TIMES.values()] * 2
