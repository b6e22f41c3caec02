"""`POST /` as contract section 4 has it, told by a stranger who has read nothing else."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import re
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio

from tests.postgres import Postgres
from tests.service import Service, until
from tests.wire import WAYS, Wire, ask, crash, get, lines, post, purchase, running, wire

BODY_MAX, BATCH_MAX, INPUT_MAX, TIMEOUT_S = 200_000, 500, 2048, 1.5
OK = {"status_code": 0, "status_message": "ok"}
KEYS = ["first key+/", "second-key"]

shared = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> dict[str, Any]:
    return WAYS[request.param]


@pytest.fixture(scope="module")
def database_url(postgres: Postgres, way: dict[str, Any]) -> str:
    """A database for each way: one would know the keys of the other."""
    return postgres.create_database()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(
    tmp_path_factory: pytest.TempPathFactory, database_url: str, way: dict[str, Any]
) -> AsyncIterator[Service]:
    """One service for all tests that leave it as it was."""
    async with running(
        tmp_path_factory.mktemp("ingest"), database_url=database_url, body_max_len=BODY_MAX,
        batch_max_events=BATCH_MAX, input_max_len=INPUT_MAX, request_timeout=TIMEOUT_S,
        **way,
    ) as service:  # fmt: skip
        yield service
        assert not service.logged("fault"), service.logged("fault")[0]["exception"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def locked(
    tmp_path_factory: pytest.TempPathFactory, postgres: Postgres, way: dict[str, Any]
) -> AsyncIterator[Service]:
    """A service with ingest keys."""
    async with running(
        tmp_path_factory.mktemp("locked"), database_url=postgres.create_database(),
        ingest_keys=KEYS, **way,
    ) as service:  # fmt: skip
        yield service


@pytest.fixture
def mark() -> str:
    """Tells the events of one test from those of all others."""
    return uuid4().hex


@pytest.fixture
def stored(service: Service, database_url: str) -> Callable[[str], Any]:
    """Loads what waits; then the rows of `crash_report` and `purchase` whose text has the mark."""

    async def rows(mark: str) -> list[tuple[int, str]]:
        assert (await service.load())["failed"] == {}
        found: list[tuple[int, str]] = []
        for table, column in (("crash_report", "message"), ("purchase", "sku")):
            sql = f"SELECT user_id, {column} FROM {table} WHERE {column} LIKE %s"
            exists = Postgres.execute(database_url, "SELECT to_regclass(%s)::text", table)
            if exists[0][0] is not None:
                found += Postgres.execute(database_url, sql, f"%{mark}%")
        return sorted(found)

    return rows


async def accepted(service: Service) -> int:
    return int((await service.status())["books"]["accepted"])


# --- what a body can be ---

ONE, TWO = crash("MARK", 1), purchase("MARK", 2)
PRETTY = json.dumps(ONE, indent=4).encode()
J1, J2 = json.dumps(ONE).encode(), json.dumps(TWO).encode()

BODIES = {
    "one object": (J1, False, [1]),
    "one object, pretty": (PRETTY, False, [1]),
    "one object, pretty, CRLF": (PRETTY.replace(b"\n", b"\r\n"), False, [1]),
    "one object between blank lines": (b"\r\n \t\n" + PRETTY + b"\n\n", False, [1]),
    "one line": (J1 + b"\n", False, [1]),
    "array": (b"[" + J1 + b"," + J2 + b"]", True, [1, 2]),
    "array of one": (b"[" + J1 + b"]", True, [1]),
    "array, pretty": (json.dumps([ONE, TWO], indent=2).encode(), True, [1, 2]),
    "array between blank lines": (b" \n[" + J1 + b" , " + J2 + b" ]\r\n ", True, [1, 2]),
    "NDJSON": (J1 + b"\n" + J2 + b"\n", True, [1, 2]),
    "NDJSON without the last newline": (J1 + b"\n" + J2, True, [1, 2]),
    "NDJSON, CRLF": (J1 + b"\r\n" + J2 + b"\r\n", True, [1, 2]),
    "NDJSON, blank lines": (b"\n\n" + J1 + b"\n\r\n  \n" + J2 + b"\n\n\n", True, [1, 2]),
}  # fmt: skip


@shared
@pytest.mark.parametrize("name", BODIES)
async def test_forms_of_a_body(service: Service, stored: Any, mark: str, name: str) -> None:
    body, batch, users = BODIES[name]
    status, answer = await service.post(body.replace(b"MARK", mark.encode()))
    assert status == 200
    assert answer == (OK | {"accepted": len(users), "rejected": 0} if batch else OK)
    assert await stored(mark) == [(user, mark) for user in users]


@shared
@pytest.mark.parametrize(
    "kind",
    [None, "application/json", "application/x-ndjson", "text/plain", "application/octet-stream",
     "application/x-www-form-urlencoded", "multipart/form-data", "application/json; charset=utf-16",
     "nonsense"],
)  # fmt: skip
@pytest.mark.parametrize("batch", [False, True])
async def test_content_type_does_not_matter(
    service: Service, kind: str | None, batch: bool
) -> None:
    body = lines(crash(), purchase()) if batch else json.dumps(crash()).encode()
    answer = await ask(service, post(body, *([f"Content-Type: {kind}"] if kind else [])))
    assert (answer.status, answer.code) == (200, 0)
    assert answer.json.get("accepted") == (2 if batch else None)


# --- packed bodies ---


def bare_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


PACKERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "gzip in capitals": ("GZIP", gzip.compress),
    "gzip, many members": (
        "gzip",
        lambda b: b"".join(gzip.compress(b[i : i + 7]) for i in range(0, len(b), 7)),
    ),
    "deflate": ("deflate", zlib.compress),
    "bare deflate": ("deflate", bare_deflate),
    "identity": ("identity", lambda b: b),
}


@shared
@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("chunked", [False, True])
async def test_packed(service: Service, stored: Any, mark: str, name: str, chunked: bool) -> None:
    encoding, pack = PACKERS[name]
    body = pack(lines(*(crash(mark, i) for i in range(3))))
    if chunked:
        body = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    more = ["Transfer-Encoding: chunked"] if chunked else []
    answer = await ask(service, post(body, f"Content-Encoding: {encoding}", *more))
    assert (answer.status, answer.json) == (200, OK | {"accepted": 3, "rejected": 0})
    assert await stored(mark) == [(i, mark) for i in range(3)]


EVENTS = lines(crash(), crash())
GZ = gzip.compress(EVENTS)
BROKEN = {
    "gzip, cut": ("gzip", GZ[:-9]),
    "gzip, its sum cut": ("gzip", GZ[:-1]),
    "gzip, head alone": ("gzip", GZ[:10]),
    "gzip, wrong sum": ("gzip", GZ[:-8] + b"\0\0\0\0" + GZ[-4:]),
    "gzip, garbage behind": ("gzip", GZ + b"garbage"),
    "gzip, second member cut": ("gzip", GZ + GZ[:-4]),
    "gzip, not packed": ("gzip", EVENTS),
    "deflate, cut": ("deflate", zlib.compress(EVENTS)[:-1]),
    "deflate, garbage behind": ("deflate", zlib.compress(EVENTS) + b"{}"),
    "deflate, two streams": ("deflate", zlib.compress(EVENTS) * 2),
    "bare deflate, cut": ("deflate", bare_deflate(EVENTS)[:-1]),
    "bare deflate, garbage behind": ("deflate", bare_deflate(EVENTS) + b"xyz"),
    "deflate, not packed": ("deflate", b"\xff\xff\xff" + EVENTS),
    "gzip said to be deflate": ("deflate", GZ),
    "deflate said to be gzip": ("gzip", zlib.compress(EVENTS)),
}


@shared
@pytest.mark.parametrize("name", BROKEN)
async def test_broken_packed_body(service: Service, name: str) -> None:
    encoding, body = BROKEN[name]
    before = await accepted(service)
    answer = await ask(service, post(body, f"Content-Encoding: {encoding}"))
    assert (answer.status, answer.code) == (400, 3)
    assert await accepted(service) == before


@shared
@pytest.mark.parametrize(
    "encoding", ["br", "zstd", "compress", "gzip, gzip", "gzip,deflate", "nonsense", "gzip;q=1"]
)
async def test_other_encodings(service: Service, encoding: str) -> None:
    answer = await ask(service, post(GZ, f"Content-Encoding: {encoding}"))
    assert (answer.status, answer.code) == (415, 3)


@shared
async def test_two_encoding_headers_are_two_encodings(service: Service) -> None:
    twice = post(gzip.compress(GZ), "Content-Encoding: gzip", "Content-Encoding: gzip")
    answer = await ask(service, twice)
    assert (answer.status, answer.code) == (415, 3)


# --- the table of answers ---


def without(event: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in event.items() if k != key}


REFUSED: list[tuple[str, object, int, int, str]] = [
    ("nothing", b"", 400, 2, ""),
    ("blanks", b" \r\n\t\n", 400, 2, ""),
    ("empty array", b"[]", 400, 2, ""),
    ("empty array in blanks", b" [ \n ] ", 400, 2, ""),
    ("text", b"nope", 400, 3, ""),
    ("string", b'"crash_report"', 400, 3, ""),
    ("number", b"1", 400, 3, ""),
    ("null", b"null", 400, 3, ""),
    ("half an object", J1[:-1], 400, 3, ""),
    ("half a pretty object", PRETTY[:-1], 400, 3, ""),
    ("two objects on a line", J1 + J2, 400, 3, ""),
    ("an object and a word", J1 + b" x", 400, 3, ""),
    ("single quotes", b"{'event_name': 'install'}", 400, 3, ""),
    ("a comma too many", J1[:-1] + b",}", 400, 3, ""),
    ("a comment", b"// hi\n" + J1, 207, 1, ""),
    ("array of a number", b"[1]", 400, 3, ""),
    ("array of an array", b"[" + b"[" + J1 + b"]]", 400, 3, ""),
    ("array, not closed", b"[" + J1, 400, 3, ""),
    ("array with a comma too many", b"[" + J1 + b",]", 400, 3, ""),
    ("array and more", b"[" + J1 + b"]" + J1, 400, 3, ""),
    ("not UTF-8", J1.replace(b"MARK", b"\xff\xfe"), 400, 3, ""),
    ("BOM", b"\xef\xbb\xbf" + J1, 400, 3, ""),
    ("BOM before an array", b"\xef\xbb\xbf[" + J1 + b"]", 400, 3, ""),
    ("UTF-16", J1.decode().encode("utf-16"), 400, 3, ""),
    ("no event_name", without(ONE, "event_name"), 400, 4, "event_name"),
    ("empty object", {}, 400, 4, "event_name"),
    ("no user_id", without(ONE, "user_id"), 400, 4, "user_id"),
    ("no timestamp", without(ONE, "timestamp"), 400, 4, "timestamp"),
    ("no message", without(ONE, "message"), 400, 4, "message"),
    ("no sku", without(TWO, "sku"), 400, 4, "sku"),
    ("a key in capitals", without(ONE, "message") | {"Message": "x"}, 400, 4, "message"),
    ("text for int", crash(timestamp="1000"), 400, 5, "timestamp int"),
    ("float for int", crash(timestamp=1.5), 400, 5, "timestamp int"),
    ("1.0 for int", crash(timestamp=1.0), 400, 5, "timestamp int"),
    ("true for int", crash(timestamp=True), 400, 5, "timestamp int"),
    ("null for int", crash(timestamp=None), 400, 5, "timestamp int"),
    ("list for int", crash(timestamp=[1]), 400, 5, "timestamp int"),
    ("number for text", crash(message=1), 400, 5, "message str"),
    ("null for text", crash(message=None), 400, 5, "message str"),
    ("object for text", crash(message={}), 400, 5, "message str"),
    ("2**63", crash(user_id=2**63), 400, 5, "user_id int"),
    ("-2**63-1", crash(user_id=-(2**63) - 1), 400, 5, "user_id int"),
    ("100 digits", crash(user_id=10**100), 400, 5, "user_id int"),
    ("U+0000", crash("a\0b"), 400, 5, "message"),
    ("too long", crash("x" * INPUT_MAX), 400, 6, ""),
    ("unknown type", crash() | {"event_name": "nope"}, 400, 7, ""),
    ("a blank before", crash() | {"event_name": " crash_report"}, 400, 7, ""),
    ("a blank behind", crash() | {"event_name": "crash_report "}, 400, 7, ""),
    ("in capitals", crash() | {"event_name": "CRASH_REPORT"}, 400, 7, ""),
    ("empty name", crash() | {"event_name": ""}, 400, 7, ""),
    ("a table of ours", crash() | {"event_name": "datapipe_ledger"}, 400, 7, ""),
    ("event_name a number", crash() | {"event_name": 7}, 400, 5, "event_name str"),
]


def as_body(body: object) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


@shared
@pytest.mark.parametrize("case", REFUSED, ids=[case[0] for case in REFUSED])
async def test_answers(service: Service, case: tuple[str, object, int, int, str]) -> None:
    _, body, status, code, words = case
    before = await accepted(service)
    answer = await ask(service, post(as_body(body)))
    assert (answer.status, answer.code) == (status, code), answer.body
    for word in words.split():
        assert word in answer.json["status_message"]
    assert await accepted(service) == before + (status == 207)


# what an event is refused for is the same alone, in an array, and on a line
EVENT_CASES = [case for case in REFUSED if isinstance(case[1], dict)]


@shared
@pytest.mark.parametrize("form", ["array", "lines"])
async def test_the_same_answers_in_a_batch(
    service: Service, stored: Any, mark: str, form: str
) -> None:
    events: list[Any] = [crash(mark, 1), *(case[1] for case in EVENT_CASES), crash(mark, 2)]
    body = json.dumps(events).encode() if form == "array" else lines(*events)
    status, answer = await service.post(body)
    assert (status, answer["status_code"]) == (207, 1)
    assert (answer["accepted"], answer["rejected"]) == (2, len(EVENT_CASES))
    for index, (error, case) in enumerate(zip(answer["errors"], EVENT_CASES, strict=True), 1):
        assert set(error) == {"index", "status_code", "status_message"}
        assert (error["index"], error["status_code"]) == (index, case[3]), case[0]
        assert all(word in error["status_message"] for word in case[4].split()), error
    assert await stored(mark) == [(1, mark), (2, mark)]


@shared
async def test_refusals_are_counted_by_reason(service: Service) -> None:
    before = (await service.status())["rejected"]
    bad = [{}, crash(timestamp=""), crash() | {"event_name": "nope"}, crash("x" * 3000)]
    await service.post(json.dumps([*bad, *bad]))
    for body, headers in ((b"", {}), (b"{", {}), (b"x", {"Content-Encoding": "br"})):
        await service.post(body, headers=headers)
    rejected = (await service.status())["rejected"]
    counted = {reason: n - before.get(reason, 0) for reason, n in rejected.items()}
    assert {reason: n for reason, n in counted.items() if n} == {
        "key_missing": 2, "bad_value": 2, "unsupported_event": 2, "too_long": 2,
        "no_content": 1, "bad_json": 1, "unsupported_encoding": 1,
    }  # fmt: skip


# --- limits, at the border ---


@shared
@pytest.mark.parametrize("packer", ["identity", "gzip", "deflate", "bare deflate"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_body_max_len(service: Service, packer: str, chunked: bool) -> None:
    encoding, pack = PACKERS[packer]
    for length, wanted in ((BODY_MAX, (200, 0)), (BODY_MAX + 1, (413, 6))):
        body = pack(J1.ljust(length))
        more = []
        if chunked:
            body, more = (
                b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
                ["Transfer-Encoding: chunked"],
            )
        answer = await ask(service, post(body, f"Content-Encoding: {encoding}", *more))
        assert (answer.status, answer.code) == wanted


@shared
async def test_an_announced_length_is_refused_without_its_body(service: Service) -> None:
    async with wire(service) as line:
        await line.send(post(b"", f"Content-Length: {BODY_MAX + 1}"))
        answer = await line.answer()
        assert (answer.status, answer.code) == (413, 6)


@shared
async def test_a_body_without_end_is_refused_while_it_comes(service: Service) -> None:
    async with wire(service) as line:
        await line.send(post(b"", "Transfer-Encoding: chunked"))
        chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"

        async def feed() -> None:
            while True:
                await line.send(chunk)
                await asyncio.sleep(0)

        feeding = asyncio.create_task(feed())
        answer = await line.answer()
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        assert (answer.status, answer.code) == (413, 6)


@shared
@pytest.mark.parametrize("form", ["array", "lines", "lines and blank ones"])
@pytest.mark.parametrize("good", [True, False])
async def test_batch_max_events(service: Service, form: str, good: bool) -> None:
    event = crash() if good else {}
    for count in (BATCH_MAX, BATCH_MAX + 1):
        if form == "array":
            body = json.dumps([event] * count).encode()
        else:
            body = lines(*[event] * count)
        if form == "lines and blank ones":
            body = b"\n\n" + body.replace(b"\n", b"\r\n \n")
        before = await accepted(service)
        status, answer = await service.post(body)
        if count > BATCH_MAX:
            assert (status, answer["status_code"]) == (413, 6)
        else:
            assert (status, answer["status_code"]) == ((200, 0) if good else (400, 4))
        assert await accepted(service) == before + (count if status == 200 else 0)


def sized(text: str, **more: object) -> dict[str, Any]:
    """A crash report; its two numbers have one digit each, so text makes up the rest."""
    return crash(text, 1, timestamp=2, **more)


ROOM = INPUT_MAX - 2


@shared
@pytest.mark.parametrize(
    ("fits", "more"),
    [("x" * ROOM, "x"), ("\u00e9" * (ROOM // 2), "x"), ("\n\t\\\"" * (ROOM // 4), "xxx"),
     ("\U0001f600" * (ROOM // 4), "xxx"), ("\x1d\x1e\x1f\x7f" * (ROOM // 4), "xxx")],
    ids=["ascii", "two bytes", "escaped", "emoji", "control"],
)  # fmt: skip
async def test_input_max_len(service: Service, fits: str, more: str) -> None:
    for event, wanted in (
        (sized(fits), (200, 0)),
        (sized(fits, ignored="x" * 5000), (200, 0)),  # not stored, so not counted
        (sized(fits + more), (400, 6)),
    ):
        for ascii_only in (True, False):
            body = json.dumps(event, ensure_ascii=ascii_only)
            status, answer = await service.post(body)
            assert (status, answer["status_code"]) == wanted, (ascii_only, len(fits))
    status, answer = await service.post([sized(fits), sized(fits + more), sized("x")])
    assert (status, answer["accepted"], answer["errors"][0]["index"]) == (207, 2, 1)
    assert answer["errors"][0]["status_code"] == 6


# --- what is refused says what to do ---

MENDS = {
    "a body": (b" " * BODY_MAX + J1, [], 413, f"{BODY_MAX} bytes, which body_max_len sets"),
    "an event": (
        json.dumps(sized("x" * INPUT_MAX)).encode(), [], 400, "2048 bytes, which input_max_len sets"
    ),
    "a batch": (
        b"\n".join([J1] * (BATCH_MAX + 1)), [], 413, "500 events in one POST, which batch_max_ev"
    ),
    "gzip": (gzip.compress(J1), [], 400, "Content-Encoding: gzip"),
    "lines without ends, as curl -d sends them": (J1 + J2, [], 400, "--data-binary"),
    "two objects on a line": (J1 + b" " + J2 + b"\n" + J1, [], 207, "--data-binary"),
}  # fmt: skip


@shared
@pytest.mark.parametrize(("body", "headers", "status", "words"), MENDS.values(), ids=MENDS)
async def test_a_refusal_names_the_mend(
    service: Service, body: bytes, headers: list[str], status: int, words: str
) -> None:
    answer = await ask(service, post(body, *headers))
    assert answer.status == status
    said = [answer.json["status_message"]]
    said += [each["status_message"] for each in answer.json.get("errors", ())]
    assert words in " ".join(said)


# --- answers to batches ---


@shared
async def test_an_index_counts_events_not_lines(service: Service, stored: Any, mark: str) -> None:
    body = lines(b"", crash(mark, 1), b"  ", b"{oops", b"", {}, crash(mark, 2), b"\xff", b'{"a": 1')
    status, answer = await service.post(body)
    assert (status, answer["accepted"], answer["rejected"]) == (207, 2, 4)
    assert [(e["index"], e["status_code"]) for e in answer["errors"]] == [
        (1, 3), (2, 4), (4, 3), (5, 3),
    ]  # fmt: skip
    assert await stored(mark) == [(1, mark), (2, mark)]


@shared
@pytest.mark.parametrize("bad", [b"garbage", b"{", b"1", b"null", b"{]", b'"x"', b"}", b"\x00"])
@pytest.mark.parametrize("place", [0, 1, 2])
async def test_lines_lose_only_the_bad_one(
    service: Service, stored: Any, mark: str, bad: bytes, place: int
) -> None:
    good: list[Any] = [crash(mark, 1), purchase(mark, 2)]
    good.insert(place, bad)
    status, answer = await service.post(lines(*good))
    assert (status, answer["accepted"], answer["rejected"]) == (207, 2, 1)
    assert [(e["index"], e["status_code"]) for e in answer["errors"]] == [(place, 3)]
    assert await stored(mark) == [(1, mark), (2, mark)]


@shared
async def test_at_most_100_errors_are_told(service: Service) -> None:
    status, answer = await service.post([crash(), *[{}] * 250, crash()])
    assert (status, answer["accepted"], answer["rejected"]) == (207, 2, 250)
    assert [error["index"] for error in answer["errors"]] == list(range(1, 101))


@shared
@pytest.mark.parametrize(
    ("first", "code"),
    [({}, 4), (crash(timestamp=""), 5), (crash("x" * 3000), 6), ({"event_name": "x"}, 7), (5, 3)],
)
@pytest.mark.parametrize("form", ["array", "lines"])
async def test_a_batch_of_which_nothing_is_good(
    service: Service, first: object, code: int, form: str
) -> None:
    bad = [first, {}, {"event_name": "nope"}]
    status, answer = await service.post(json.dumps(bad) if form == "array" else lines(*bad))
    assert (status, answer["status_code"]) == (400, code)
    assert (answer["accepted"], answer["rejected"]) == (0, 3)
    assert [error["index"] for error in answer["errors"]] == [0, 1, 2]


@shared
@pytest.mark.parametrize(
    "broken",
    [b"[%b, %b", b"[%b %b]", b"[%b, %b,]", b"[%b, {oops}, %b]", b"[%b, \xff, %b]", b"[%b, %b]]",
     b"[%b, NaN, %b]", b"[%b, 01, %b]"],
)  # fmt: skip
async def test_an_array_that_does_not_parse_is_refused_whole(
    service: Service, broken: bytes
) -> None:
    before = await accepted(service)
    status, answer = await service.post(broken % (J1, J2))
    assert (status, answer["status_code"]) == (400, 3)
    assert await accepted(service) == before


# --- Idempotency-Key ---


def keyed(key: str) -> dict[str, Any]:
    return {"headers": {"Idempotency-Key": key}}


@shared
@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "caf\u00e9", "a\tb", "\u20ac"])
async def test_a_key_out_of_form(service: Service, key: str) -> None:
    before = await accepted(service)
    answer = await ask(service, post(J1, f"Idempotency-Key: {key}"))
    assert (answer.status, answer.code) == (400, 3)
    assert "Idempotency-Key" in answer.json["status_message"]
    assert await accepted(service) == before


@shared
@pytest.mark.parametrize("key", ["!", "~", "x" * 255, '"quoted"', "a,b;c=d'e\\f%00"])
async def test_a_key_in_form_counts_once(
    service: Service, stored: Any, mark: str, key: str
) -> None:
    for _ in range(3):
        assert await service.post(crash(mark), **keyed(key)) == (200, OK)
    assert await stored(mark) == [(1, mark)]
    assert await service.post(crash(mark), **keyed(key)) == (200, OK)
    assert await stored(mark) == [(1, mark)]


@shared
async def test_keys_differ_in_every_byte(service: Service, stored: Any, mark: str) -> None:
    for i, key in enumerate([mark, mark + "a", mark + "A", mark[:-1]]):
        assert await service.post(crash(mark, i), **keyed(key)) == (200, OK)
    assert await stored(mark) == [(i, mark) for i in range(4)]


@shared
async def test_a_batch_over_two_lanes_counts_once(service: Service, stored: Any, mark: str) -> None:
    body = [crash(mark, 1), purchase(mark, 2), crash(mark, 3), {}]
    before = (await service.status())["books"]["duplicate"]
    for _ in range(2):
        status, answer = await service.post(body, **keyed(mark))
        assert (status, answer["accepted"], answer["rejected"]) == (207, 3, 1)
    await service.load()
    await service.post(body, **keyed(mark))
    assert await stored(mark) == [(1, mark), (2, mark), (3, mark)]
    books = (await service.status())["books"]
    assert (books["duplicate"] - before, books["balanced"]) == (6, True)


@shared
async def test_another_body_under_a_key_is_refused(
    service: Service, stored: Any, mark: str
) -> None:
    assert (await service.post([{}], **keyed(mark)))[0] == 400  # stores nothing: claims nothing
    assert await service.post(crash(mark, 1), **keyed(mark)) == (200, OK)
    rejected = (await service.status())["rejected"].get("key_reused", 0)
    for other in (
        crash(mark, 2),
        [crash(mark, 1)],
        [crash(mark, 1), purchase(mark, 3)],
        "nonsense",
    ):
        status, answer = await service.post(other, **keyed(mark))
        assert (status, answer["status_code"]) == (422, 10)
        assert "key of its own" in answer["status_message"]
    assert (await service.status())["rejected"]["key_reused"] == rejected + 4
    assert await service.post(crash(mark, 1), **keyed(mark)) == (200, OK)
    assert await stored(mark) == [(1, mark)]


@shared
async def test_the_same_key_at_the_same_time(service: Service, stored: Any, mark: str) -> None:
    body = [crash(mark, 1), purchase(mark, 2)]
    posts = [service.post(body, **keyed(mark)) for _ in range(30)]
    loads = [service.load() for _ in range(3)]
    answers, _ = await asyncio.gather(asyncio.gather(*posts), asyncio.gather(*loads))
    assert {status for status, _ in answers} == {200}
    assert await stored(mark) == [(1, mark), (2, mark)]


@shared
async def test_big_keyed_batches_over_two_lanes(service: Service, stored: Any, mark: str) -> None:
    text = mark + "x" * 200
    body = [(crash, purchase)[i % 2](text, i) for i in range(400)]
    again = json.dumps(body)  # more than 100 KB, in many parts
    assert (await service.post(again, **keyed(mark)))[1]["accepted"] == 400
    await service.load("?lane=purchase")
    assert (await service.post(again, **keyed(mark)))[1]["accepted"] == 400
    packed = gzip.compress(again.encode())
    more = {"headers": {"Idempotency-Key": mark, "Content-Encoding": "gzip"}}
    assert (await service.post(packed, **more))[1]["accepted"] == 400
    assert await stored(mark) == [(i, text) for i in range(400)]


async def test_keys_outlive_restarts_and_kills(
    make_service: Callable[..., Service], database: str
) -> None:
    service = make_service(database_url=database, load_interval=3600)
    body = [*(crash("x" * 300, i) for i in range(150)), *(purchase("y", i) for i in range(150))]
    await service.start()
    assert (await service.post(body, **keyed("k")))[1]["accepted"] == 300  # waits
    await service.kill()
    await service.start()
    assert (await service.post(body, **keyed("k")))[1]["accepted"] == 300  # loads, then waits
    await service.load()
    await service.kill()
    await service.start()
    assert (await service.post(body, **keyed("k")))[1]["accepted"] == 300
    assert await service.stop() == 0
    for table in ("crash_report", "purchase"):
        sql = f"SELECT count(*), count(DISTINCT user_id) FROM {table}"
        assert Postgres.execute(database, sql) == [(150, 150)]


# --- ingest keys ---


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


ALLOWED = {
    "Bearer": ("/", {"Authorization": f"Bearer {KEYS[1]}"}),
    "bearer": ("/", {"Authorization": f"bearer {KEYS[0]}"}),
    "Basic": ("/", {"Authorization": basic("", KEYS[0])}),
    "Basic with a user": ("/", {"Authorization": basic("somebody", KEYS[1])}),
    "query": (f"/?key={KEYS[1]}", {}),
    "query, quoted": ("/?key=first%20key%2B%2F", {}),
}
NOT_ALLOWED = {
    "none": ("/", {}),
    "wrong Bearer": ("/", {"Authorization": "Bearer nope"}),
    "empty Bearer": ("/", {"Authorization": "Bearer "}),
    "no scheme": ("/", {"Authorization": KEYS[1]}),
    "both keys": ("/", {"Authorization": "Bearer " + "".join(KEYS)}),
    "key as user": ("/", {"Authorization": basic(KEYS[1], "")}),
    "wrong Basic": ("/", {"Authorization": basic("u", "nope")}),
    "broken Basic": ("/", {"Authorization": "Basic !!!"}),
    "wrong query": ("/?key=nope", {}),
    "empty query": ("/?key=", {}),
    "other scheme": ("/", {"Authorization": f"Digest {KEYS[1]}"}),
    "not ASCII": ("/", {"Authorization": "Bearer caf\u00e9"}),
}


def authorized(name: str, among: dict[str, tuple[str, dict[str, str]]], body: bytes = J1) -> bytes:
    target, headers = among[name]
    return post(body, *(f"{k}: {v}" for k, v in headers.items()), target=target)


@shared
@pytest.mark.parametrize("name", ALLOWED)
async def test_an_ingest_key(locked: Service, name: str) -> None:
    answer = await ask(locked, authorized(name, ALLOWED))
    assert (answer.status, answer.code) == (200, 0)


@shared
@pytest.mark.parametrize("name", NOT_ALLOWED)
async def test_no_or_a_wrong_ingest_key(locked: Service, name: str) -> None:
    before = await accepted(locked)
    answer = await ask(locked, authorized(name, NOT_ALLOWED))
    assert (answer.status, answer.code) == (401, 8)
    challenge = answer.headers["www-authenticate"]
    assert re.findall(r"(\w+) realm=", challenge) == ["Basic", "Bearer"]
    assert await accepted(locked) == before
    assert (await ask(locked, authorized(name, NOT_ALLOWED, b"nonsense"))).status == 401


@shared
async def test_idempotency_keys_of_other_ingest_keys_are_others(locked: Service) -> None:
    await locked.load()
    before = (await locked.status())["books"]
    for key in (*KEYS, *KEYS):
        headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "same"}
        assert (await locked.post(crash("own"), headers=headers))[0] == 200
    assert (await locked.load())["loaded"] == {"crash_report": 2}
    books = (await locked.status())["books"]
    assert books["duplicate"] - before["duplicate"] == 2


@shared
async def test_ingest_keys_are_never_shown(locked: Service) -> None:
    await ask(locked, authorized("query", ALLOWED, b"{"))
    await ask(locked, b"GET /nope?key=second-key HTTP/1.1\r\nHost: x\r\n\r\n", method="GET")
    await ask(locked, post(b"{}", "Content-Length: x", target="/?key=second-key"))
    shown = "\n".join(locked.raw) + json.dumps(await locked.status())
    assert "second-key" not in shown
    assert "first key" not in shown


# --- X-Request-ID ---

ANYWHERE = {
    "taken": (b"POST", b"/", J1, 200),
    "refused": (b"POST", b"/", b"{", 400),
    "too long": (b"POST", b"/", b" " * (BODY_MAX + 1), 413),
    "no such path": (b"GET", b"/nope", b"", 404),
    "no such method": (b"DELETE", b"/", b"", 405),
    "page": (b"GET", b"/status.json", b"", 200),
}


@shared
@pytest.mark.parametrize("name", ANYWHERE)
async def test_request_id(service: Service, name: str) -> None:
    method, target, body, status = ANYWHERE[name]

    async def answered(*headers: bytes) -> str:
        head = b"%b %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
        request = head % (method, target, len(body)) + b"".join(h + b"\r\n" for h in headers)
        answer = await ask(service, request + b"\r\n" + body)
        assert answer.status == status
        return answer.headers["x-request-id"]

    for good in ("a", "A-z_0.9", "x" * 128):
        assert await answered(b"X-Request-ID: " + good.encode()) == good
    bad = [b"x" * 129, b"a b", b"a/b", "caf\u00e9".encode(), b"", b"a,b", b"<b>"]
    replaced = [await answered(b"X-Request-ID: " + id) for id in bad] + [await answered()]
    assert len(set(replaced)) == len(replaced)
    assert not {id.decode() for id in bad} & set(replaced)


# --- time ---


async def trickle(line: Wire, data: bytes) -> None:
    for i in range(len(data)):
        await line.send(data[i : i + 1])
        await asyncio.sleep(TIMEOUT_S / 20)


SLOW = {
    "half a head": (post(J1)[:20], b""),
    "a head byte by byte": (b"", post(J1, "X-Padding: " + "x" * 400)),
    "not a word": (b"", b""),
    "half a body": (post(J1)[:-1], b""),
    "no body": (post(b"", "Content-Length: 5"), b""),
    "a body byte by byte": (post(b"", "Content-Length: 500"), b" " * 500),
    "a chunked body without end": (post(b"5\r\n{\r\n\r\n\r\n", "Transfer-Encoding: chunked"), b""),
}


@shared
async def test_slow_requests(service: Service) -> None:
    async def one(name: str) -> None:
        at_once, slowly = SLOW[name]
        async with wire(service) as line:
            await line.send(at_once)
            feeding = asyncio.create_task(trickle(line, slowly))
            answer = await line.answer(TIMEOUT_S * 4)
            assert (answer.status, answer.json["status_code"]) == (408, 3), name
            assert answer.headers.get("connection", "").lower() == "close", name
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
            if "body" not in name:  # the rest of a body is read for a while, then dropped
                await line.ended(5)

    before = await accepted(service)
    await asyncio.gather(*(one(name) for name in SLOW))
    assert await accepted(service) == before


@shared
async def test_a_connection_may_rest_between_requests(service: Service) -> None:
    """`request_timeout` bounds a head that has begun, not the time until the next one."""
    async with wire(service) as line, wire(service) as slow:
        await line.send(post(J1))
        assert (await line.answer()).status == 200
        await slow.send(post(J1)[:-1])
        assert (await slow.answer()).status == 408  # so more than the timeout has passed
        await line.send(post(J1))
        assert (await line.answer()).status == 200


# --- HTTP itself ---


@shared
async def test_expect_100_continue(service: Service) -> None:
    async with wire(service) as line:
        await line.send(post(b"", "Expect: 100-continue", f"Content-Length: {len(J1)}"))
        assert await line.interim() == 100
        await line.send(J1)
        assert (await line.answer()).json == OK
    async with wire(service) as line:
        await line.send(post(b"", "Expect: 100-continue", f"Content-Length: {BODY_MAX + 1}"))
        answer = await line.answer()
        assert (answer.status, answer.code) == (413, 6)


@shared
async def test_pipelined(service: Service, stored: Any, mark: str) -> None:
    bodies = [json.dumps(crash(mark, i)).encode() for i in range(20)]
    bodies[7] = bodies[13] = b"{"
    async with wire(service) as line:
        await line.send(
            b"".join(post(body, f"X-Request-ID: r{i}") for i, body in enumerate(bodies))
        )
        for i in range(20):
            answer = await line.answer()
            assert answer.headers["x-request-id"] == f"r{i}"
            assert answer.status == (400 if i in (7, 13) else 200)
    assert [user for user, _ in await stored(mark)] == [i for i in range(20) if i not in (7, 13)]


@shared
@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_http_versions(service: Service, version: str) -> None:
    answer = await ask(service, post(J1, version=version))
    assert (answer.status, answer.json) == (200, OK)


@shared
async def test_http_1_0_is_told_that_its_connection_is_kept(service: Service) -> None:
    """A client that asked for it (`ab -k`) and is not told reads until the end, and hangs."""
    async with wire(service) as line:
        for _ in range(3):
            await line.send(post(J1, "Connection: keep-alive", version="1.0"))
            answer = await line.answer()
            assert (answer.status, answer.code) == (200, 0)
            assert answer.headers["connection"].lower() == "keep-alive"
    async with wire(service) as line:
        await line.send(post(J1, version="1.0"))
        assert b" 200 " in (await line.ended()).split(b"\r\n")[0]


@shared
async def test_a_client_that_leaves_in_the_middle(service: Service) -> None:
    before = await accepted(service)
    async with wire(service) as line:
        await line.send(post(J1)[:-1])
    async with wire(service) as line:
        await line.send(post(b"8\r\n{", "Transfer-Encoding: chunked"))
    status, _ = await service.post(crash())
    assert status == 200
    assert await accepted(service) == before + 1


ELSEWHERE = [
    ("GET", "/nope", 404), ("POST", "/nope", 404), ("POST", "/events/", 404), ("GET", "/..", 404),
    ("HEAD", "/nope", 404), ("PUT", "/", 405), ("DELETE", "/", 405), ("PATCH", "/", 405),
    ("OPTIONS", "/", 405), ("TRACE", "/", 405), ("PROPFIND", "/", 405), ("GET", "/load", 405),
    ("POST", "/status.json", 405), ("POST", "/healthz", 405), ("DELETE", "/metrics", 405),
    ("GET", "/%00", 404), ("GET", "/%ff", 404), ("POST", "//", 404),
]  # fmt: skip


@shared
@pytest.mark.parametrize(("method", "target", "status"), ELSEWHERE)
async def test_other_paths_and_methods(
    service: Service, method: str, target: str, status: int
) -> None:
    request = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    answer = await ask(service, request.encode(), method=method)
    assert answer.status == status, answer
    if method != "HEAD":
        assert answer.code != 0
    assert status != 405 or answer.headers["allow"]


@shared
async def test_head_of_the_page(service: Service) -> None:
    async with wire(service) as line:
        await line.send(b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = await line.answer(method="HEAD")
        assert (answer.status, answer.body) == (200, b"")
        await line.send(post(J1))  # nothing of a body lies between
        assert (await line.answer()).json == OK


@shared
@pytest.mark.parametrize("path", ["/", "/style.css", "/status.json", "/metrics", "/nope"])
async def test_a_connection_goes_on_after_any_answer(service: Service, path: str) -> None:
    async with wire(service) as line:
        for _ in range(3):
            await line.send(get(path))
            assert (await line.answer(method="GET")).status in (200, 404)
            await line.send(post(J1))
            assert (await line.answer()).json == OK
    assert not [line for line in service.lines if line["level"] in ("error", "critical")]


MALFORMED = {
    "no HTTP at all": b"hello\r\n\r\n",
    "binary": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a target that is not ASCII": "GET /caf\u00e9 HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    "no such method": b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n",
    "bad version": b"POST / HTTP/x.y\r\nHost: x\r\n\r\n",
    "a length that is none": post(b"", "Content-Length: x"),
    "a negative length": post(b"", "Content-Length: -1"),
    "two lengths": post(b"{}", "Content-Length: 2", "Content-Length: 3"),
    "length and chunks": post(b"0\r\n\r\n", "Content-Length: 5", "Transfer-Encoding: chunked"),
    "a header without colon": b"POST / HTTP/1.1\r\nHost localhost\r\n\r\n",
    "a header with U+0000": b"POST / HTTP/1.1\r\nHost: a\0b\r\n\r\n",
    "a huge header": post(b"", "X-Huge: " + "x" * 100_000),
    "a huge target": post(b"", target="/" + "x" * 100_000),
    "a chunk that is none": post(b"zz\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    "a bare CR in a target": b"POST /\r HTTP/1.1\r\nHost: x\r\n\r\n",
    "a foreign encoding of transfer": post(b"", "Transfer-Encoding: nonsense"),
}


@shared
@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed_http(service: Service, name: str) -> None:
    answer = await ask(service, MALFORMED[name])
    assert 400 <= answer.status < 500, answer
    assert answer.code == 3
    assert len(answer.body) < 1000
    assert (await service.post(crash()))[0] == 200


@shared
async def test_each_post_is_timed_once_its_answer_is_out(service: Service) -> None:
    async def timed() -> float:
        text = (await ask(service, get("/metrics"), method="GET")).body.decode()
        name = "datapipe_request_seconds_count "
        return float(next(line for line in text.splitlines() if line.startswith(name)).split()[1])

    before = await timed()
    chunked = post(b"%x\r\n%b\r\n0\r\n\r\n" % (len(J1), J1), "Transfer-Encoding: chunked")
    for request in (post(J1), post(b"{"), post(b"[%b]" % J1), post(J1, version="1.0"), chunked):
        await ask(service, request)
    assert await timed() == before + 5


# --- shutting down ---


async def test_a_post_on_an_open_connection_while_stopping(
    make_service: Callable[..., Service], database: str, way: dict[str, Any]
) -> None:
    settings = {"database_url": database, "load_interval": 3600, **way}
    service = await make_service(**settings).start()
    async with wire(service) as open_one, wire(service) as received:
        await open_one.send(post(J1))
        assert (await open_one.answer()).status == 200
        await received.send(post(J1)[:-1])
        assert service._process is not None

        async def received_head() -> bool:
            return "datapipe" in await (await service.session.get(service.url)).text()

        await until(received_head)
        stopping = asyncio.create_task(service.stop())

        async def said() -> bool:
            return bool(service.logged("stopping"))

        await until(said)
        await open_one.send(post(J1))
        answer = await open_one.answer()
        assert (answer.status, answer.code) == (503, 9)
        assert answer.headers["connection"].lower() == "close"
        assert int(answer.headers["retry-after"]) >= 1
        await received.send(J1[-1:])
        assert (await received.answer()).json == OK
        assert await stopping == 0
    assert Postgres.execute(database, "SELECT count(*) FROM crash_report") == [(2,)]
