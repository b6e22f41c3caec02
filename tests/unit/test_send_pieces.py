"""`datapipe send`: how an input is cut, and what follows from answers and from its state file."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.cli import main
from datapipe.cli.send import command, cut
from datapipe.cli.send.client import Answer, judge
from datapipe.cli.send.cut import Block, Mark, Piece, blocks
from datapipe.cli.send.items import Elements, Lines, array_start
from datapipe.cli.send.source import BrokenInput, Source
from datapipe.cli.send.state import State
from datapipe.errors import ConfigError, DatapipeError
from datapipe.settings import Settings
from tests.ports import free_port

# --- bytes -> items -> blocks -> pieces ---

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
EVENTS = st.fixed_dictionaries({"event_name": st.sampled_from("abc"), "x": VALUES})


def chunked(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    """In chunks of these sizes, over and over."""
    at = turn = 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        yield data[at : at + size]
        at, turn = at + size, turn + 1


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@settings(max_examples=40)
@given(st.lists(VALUES, max_size=12), SIZES, st.sampled_from([None, 1]))
def test_the_elements_of_an_array_however_it_comes(
    values: list[Any], sizes: list[int], indent: int | None
) -> None:
    data = json.dumps(values, indent=indent).encode() + b"\n "
    items = Elements(chunked(data[1:], sizes), "f", begun=False)
    found = [json.loads(item) for batch in items for item in batch if item.strip()]
    assert found == values


@pytest.mark.parametrize("text", ["[1, 2", "[1] 2", "[1, {]", '[1, "', "[1}", "["])
def test_what_is_no_array_is_told(text: str) -> None:
    with pytest.raises(BrokenInput, match=r"f: .*array"):
        list(Elements(iter([text[1:].encode()]), "f", begun=False))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 7 items, pieces of 3 that have at most 100 bytes."""
    for name, value in (
        ("_BLOCK_ITEMS", 7), ("_BLOCK_BYTES", 500), ("_PIECE_ITEMS", 3), ("_PIECE_BYTES", 100),
    ):  # fmt: skip
        monkeypatch.setattr(cut, name, value)


def cut_up(
    data: bytes, start: Mark, cuts: list[int], sizes: list[int], *, array: bool = False
) -> list[Block]:
    start = max(start, Mark(array_start(data)))
    chunks = chunked(data[start.offset :], sizes)
    items: Any = Lines(chunks, "f", grows=True)
    if array:
        items = Elements(chunks, "f", begun=start.offset > 1)
    return list(blocks(items, start, cuts))


def sent(found: list[Block]) -> list[tuple[int, bytes]]:
    return [(piece.number, piece.body()) for block in found for piece in block.pieces]


@pytest.mark.usefixtures("small")
@settings(max_examples=40)
@given(st.lists(EVENTS, max_size=30), SIZES, SIZES, st.booleans(), st.data())
def test_the_cut_depends_on_the_content_alone(
    events: list[Any], sizes: list[int], others: list[int], array: bool, data: Any
) -> None:
    """However it is read, from wherever it goes on, and after it has grown."""
    texts = [json.dumps(event) for event in events]
    text = ("[" + ",".join(texts) + "]" if array else "".join(f"{t}\n" for t in texts)).encode()
    whole = cut_up(text, Mark(), [], sizes, array=array)
    assert sorted(json.dumps(e) for _, body in sent(whole) for e in json.loads(body)) == sorted(
        json.dumps(event) for event in events
    )
    for block in whole:
        assert all(len({json.loads(i)["event_name"] for i in p.items}) == 1 for p in block.pieces)
        assert all(len(p.items) <= 3 for p in block.pieces)
    if not whole:
        return
    after = data.draw(st.integers(0, len(whole) - 1))
    rest = cut_up(text, whole[after].end, [], others, array=array)
    assert sent(whole[: after + 1]) + sent(rest) == sent(whole)
    if array:
        return
    end = data.draw(st.integers(0, len(text)))  # where the file ended once
    before = cut_up(text[:end], Mark(), [], sizes)
    cuts = [block.end.offset for block in before if block.ended]
    reached = before[-1].end if before else Mark()
    grown = sent(before) + sent(cut_up(text, reached, cuts, sizes))
    assert grown == sent(cut_up(text, Mark(), cuts, others))


# --- packed input ---


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (gzip.compress(b"{}\n" * 10**6, mtime=0)[:-9], "cut off"),
        (gzip.compress(b"{}\n", mtime=0) + b"more", "broken"),
        (b"\x28\xb5\x2f\xfdxxxxxxxxxxx", "broken"),
    ],
)
def test_packed_data_that_is_broken(tmp_path: Path, content: bytes, error: str) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(BrokenInput, match=error):
        _read(tmp_path / "f")


def test_packed_data_in_bounded_steps(tmp_path: Path) -> None:
    data = b"{}\n" * 10**6
    (tmp_path / "f").write_bytes(gzip.compress(data, mtime=0) + bytes(512) + gzip.compress(data))
    assert _read(tmp_path / "f") == data * 2
    assert _read(tmp_path / "f", start=len(data) + 1) == data[1:]
    with pytest.raises(BrokenInput, match="shorter"):
        _read(tmp_path / "f", start=len(data) * 2 + 2)


def _read(path: Path, start: int = 0) -> bytes:
    source = Source(str(path))
    try:
        chunks = list(source.chunks(start))
    finally:
        source.close()
    assert max(map(len, chunks), default=0) <= 1 << 20
    return b"".join(chunks)


def test_a_file_is_sent_by_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"{}\n")
    first = Source(str(tmp_path / "f"))
    with pytest.raises(DatapipeError, match="another"):
        Source(str(tmp_path / "f"))
    first.close()
    Source(str(tmp_path / "f")).close()


# --- answers ---


def piece(count: int) -> Piece:
    return Piece("a", Mark(), 0, [b"{}"] * count, range(count))


@pytest.mark.parametrize(
    ("rejected", "told", "counted"),
    [(range(100), 100, 100), (range(500), 500, 500), (range(300, 450), 100 + 100, 150)],
)
def test_of_more_than_100_refused_none_is_forgotten(
    rejected: range, told: int, counted: int
) -> None:
    """An answer names the first 100: the others are all that they can be."""
    errors = [{"index": i, "status_code": 5, "status_message": "no"} for i in rejected[:100]]
    content = {"status_code": 1, "accepted": 500 - len(rejected), "errors": errors}
    outcome = judge(piece(500), Answer(207, content, None), "URL")
    assert (outcome.accepted, outcome.refused) == (500 - counted, counted)
    assert len(outcome.refusals) == told
    assert {each.number - 1 for each in outcome.refusals} >= set(rejected)


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "--key-file"), (403, "type 'a'"), (422, "used"), (404, "404"), (301, "301")],
)
def test_what_a_person_must_act_upon_stops_it(status: int, words: str) -> None:
    with pytest.raises(DatapipeError, match=words):
        judge(piece(2), Answer(status, {"status_message": "key used"}, None), "URL")


@pytest.fixture
def thousands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 1,000 items."""
    monkeypatch.setattr(cut, "_PIECE_ITEMS", 1000)


class Stub:
    """A service that answers as told first, and then takes what it gets, each key once."""

    def __init__(self, *answers: Callable[[int], web.Response] | None, most: int = 10**6) -> None:
        self.answers = list(answers)
        self.bodies: dict[str, list[Any]] = {}
        self.posts = 0
        self.full_until: dict[str, int] = {}  # by lane: how many events must be taken before
        self._most = most

    async def handle(self, request: web.Request) -> web.Response:
        self.posts += 1
        body = json.loads(await request.read())
        if len(body) > self._most:
            return web.json_response({"status_code": 6, "status_message": "long"}, status=413)
        if len(self.taken) < self.full_until.get(body[0]["event_name"], 0):
            return busy(len(body))
        first = self.answers.pop(0) if self.answers else None
        if first is None or first is lost:
            self.bodies.setdefault(request.headers["Idempotency-Key"], body)
        if first is None:
            return web.json_response(
                {"status_code": 0, "status_message": "ok", "accepted": len(body), "rejected": 0}
            )
        return first(len(body))

    @property
    def taken(self) -> list[int]:
        return sorted(event["n"] for body in self.bodies.values() for event in body)


def lost(count: int) -> web.Response:
    raise ConnectionResetError  # the answer, not the events


def busy(count: int) -> web.Response:
    content = {"status_code": 9, "status_message": "no room for a", "busy": ["a"]}
    return web.json_response(content, status=503, headers={"Retry-After": "0"})


def partly_busy(count: int) -> web.Response:
    errors = [{"index": 0, "status_code": 9, "status_message": "no room"}]
    content = {"status_code": 1, "accepted": count - 1, "errors": errors, "busy": ["a"]}
    return web.json_response(content, status=207, headers={"Retry-After": "0"})


def one_refused(count: int) -> web.Response:
    errors = [{"index": 0, "status_code": 5, "status_message": "no"}]
    content = {"status_code": 1, "accepted": count - 1, "rejected": 1, "errors": errors}
    return web.json_response(content, status=207)


def overloaded(count: int) -> web.Response:
    return web.Response(status=502, text="<html>")


def limited(count: int) -> web.Response:
    content = {"status_code": 11, "status_message": "slow down"}
    return web.json_response(content, status=429, headers={"Retry-After": "0"})


def stop(count: int) -> web.Response:
    os.kill(os.getpid(), signal.SIGINT)
    return overloaded(count)


async def send(url: str, *words: object, **more: Any) -> int:
    args = main._parser().parse_args(["send", "--url", url, *map(str, words)])
    code: int = await args.command(Settings(**more), args)
    return code


def events(count: int, start: int = 0) -> bytes:
    return b"".join(b'{"event_name": "a", "n": %d}\n' % n for n in range(start, start + count))


async def stubbed(stub: Stub, *words: object, **more: Any) -> int:
    app = web.Application()
    app.router.add_post("/", stub.handle)
    async with TestServer(app, port=more.pop("port", None)) as server:
        return await send(str(server.make_url("/")), *words, **more)


@pytest.mark.usefixtures("thousands")
async def test_it_sends_again_for_as_long_as_that_helps(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(events(2500))
    stub = Stub(lost, busy, partly_busy, overloaded, limited)
    assert await stubbed(stub, tmp_path / "f") == 0
    assert stub.taken == list(range(2500))
    assert stub.posts == 3 + 5


async def test_what_is_too_much_at_once_goes_out_in_halves(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b'{"event_name": "a", "n": 1}\n' * 1500)
    stub = Stub(most=300)
    assert await stubbed(stub, tmp_path / "f") == 0
    assert stub.taken == [1] * 1500  # halves that are alike are two
    assert await stubbed(stub, tmp_path / "f", "--again", "--state", tmp_path / "new") == 0
    assert stub.taken == [1] * 1500


async def test_an_event_that_no_service_takes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(events(3))
    assert await stubbed(Stub(most=0), tmp_path / "f") == 1
    told = [json.loads(line) for line in (tmp_path / "f.refused").read_text().splitlines()]
    assert sorted(each["line"] for each in told) == [1, 2, 3]
    assert {each["status_code"] for each in told} == {6}


@pytest.mark.usefixtures("thousands")
async def test_a_signal_stops_it_and_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f").write_bytes(events(2500))
    stub = Stub(None, stop)
    state = tmp_path / "state"
    words = [tmp_path / "f", "--parallel", 1, "--id", "x", "--state", state]
    assert await stubbed(stub, *words, port=(port := free_port())) == 1
    assert "goes on from here" in capsys.readouterr().err
    assert len(stub.taken) == 1000
    assert await stubbed(stub, *words, port=port) == 0
    assert stub.taken == list(range(2500))
    assert "sent 2,500: " in capsys.readouterr().out  # the lane was behind from the first on


async def test_a_lane_that_was_set_aside_is_sent_in_another_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_BLOCK_ITEMS", 500), ("_PIECE_ITEMS", 10)):
        monkeypatch.setattr(cut, name, value)
    data = [b'{"event_name": "%b", "n": %d}\n' % (b"ab"[n % 2 :][:1], n) for n in range(1000)]
    data[400] = data[900] = b"no\n"  # the file ends where a block does
    (tmp_path / "f").write_bytes(b"".join(data))
    stub = Stub()
    stub.full_until["a"] = 500
    assert await stubbed(stub, tmp_path / "f") == 1
    assert stub.taken == [n for n in range(1000) if n not in (400, 900)]
    assert len(stub.bodies) == 2 * 50
    told = [json.loads(line)["line"] for line in (tmp_path / "f.refused").read_text().splitlines()]
    assert told == [401, 901]


async def test_on_a_terminal_a_bar_says_how_far_it_is_and_what_holds_it_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_SHOW_S", 0.02)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    (tmp_path / "f").write_bytes(events(100))
    assert await stubbed(Stub(overloaded, busy), tmp_path / "f") == 0
    said = capsys.readouterr().err
    assert "0 events; http://127.0.0.1:" in said
    assert "answers 502" in said
    assert "0 events; no room for a" in said
    assert re.search(r"100%.* 100 events\]", said)


# --- the state file ---


def remember(path: Path, **changes: Any) -> None:
    state = msgspec.json.decode(path.read_bytes(), type=State)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(state, **changes)))


async def test_what_may_be_loaded_already_is_sent_again_only_on_request(tmp_path: Path) -> None:
    file, state, port = tmp_path / "f", tmp_path / "f.datapipe-sent", free_port()
    file.write_bytes(events(2500))
    stub = Stub()
    assert await stubbed(stub, file, port=port) == 0
    old = datetime.now(UTC) - timedelta(seconds=3601)
    remember(state, advanced_at=old)
    assert await stubbed(stub, file, port=port, dedupe_window=3600) == 0  # there is nothing to do
    broken = {"whole": False, "behind": {"a": Mark(0, 0, 0)}, "done": Mark()}
    remember(state, advanced_at=old, **broken)
    assert await stubbed(stub, file, port=port, dedupe_window=3700) == 0
    remember(state, advanced_at=old, **broken)
    with pytest.raises(DatapipeError, match=r"lines 1 to 2,500 .*--again"):
        await stubbed(stub, file, port=port, dedupe_window=3600)
    assert await stubbed(stub, file, "--again", port=port, dedupe_window=3600) == 0
    with pytest.raises(DatapipeError, match=r"was sent to .*--state"):
        await stubbed(stub, file)
    with pytest.raises(DatapipeError, match="--id"):
        await stubbed(stub, file, "--id", "another", port=port)
    state.write_text("{}")
    with pytest.raises(DatapipeError, match="is not a state file"):
        await stubbed(stub, file, port=port)
    assert stub.taken == list(range(2500))


async def test_a_run_without_an_answer_makes_no_key_younger(tmp_path: Path) -> None:
    file, state = tmp_path / "f", tmp_path / "f.datapipe-sent"
    file.write_bytes(events(10))
    assert await stubbed(Stub(), file, port=(port := free_port())) == 0
    broken = {"whole": False, "behind": {"a": Mark()}, "done": Mark()}
    remember(state, advanced_at=datetime.now(UTC) - timedelta(seconds=3000), **broken)
    assert await stubbed(Stub(stop), file, port=port, dedupe_window=3600) == 1
    left = msgspec.json.decode(state.read_bytes(), type=State)
    assert datetime.now(UTC) - left.advanced_at > timedelta(seconds=3000)
    assert await stubbed(Stub(), file, port=port, dedupe_window=3600) == 0
    done = msgspec.json.decode(state.read_bytes(), type=State)
    assert datetime.now(UTC) - done.advanced_at < timedelta(seconds=3000)
    # nothing is behind, however long ago that was
    remember(state, advanced_at=datetime.now(UTC) - timedelta(seconds=4000))
    file.write_bytes(events(20))
    assert await stubbed(Stub(stop), file, port=port, dedupe_window=3600) == 1
    assert await stubbed(Stub(), file, port=port, dedupe_window=3600) == 0


@pytest.mark.parametrize(
    "more", ["u:SECRET@host", "SECRET@host", "host/?key=SECRET", "host/#SECRET"]
)
async def test_a_url_with_a_secret_gets_into_no_file(tmp_path: Path, more: str) -> None:
    (tmp_path / "f").write_bytes(events(1))
    with pytest.raises(ConfigError, match="--key-file") as refused:
        await send(f"http://{more}", tmp_path / "f")
    assert "SECRET" not in str(refused.value)
    assert [each.name for each in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("held", [b"", b"\n", b"a\nb", b"\xff"])
async def test_a_key_file_without_a_key_is_told(tmp_path: Path, held: bytes) -> None:
    (tmp_path / "f").write_bytes(events(1))
    (tmp_path / "key").write_bytes(held)
    with pytest.raises(ConfigError, match="one key, on one line"):
        await stubbed(Stub(), tmp_path / "f", "--key-file", tmp_path / "key")


@pytest.mark.parametrize("url", ["host", "ftp://host", "http://", "http://host:99999", "http://["])
async def test_what_is_no_url_leaves_nothing_behind(tmp_path: Path, url: str) -> None:
    (tmp_path / "f").write_bytes(events(1))
    with pytest.raises(ConfigError, match="is not a URL"):
        await send(url, tmp_path / "f")
    assert [each.name for each in tmp_path.iterdir()] == ["f"]


async def test_what_was_not_begun_has_no_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for named in ([tmp_path / "missing"], [tmp_path / "f", "--parallel", "0"]):
        (tmp_path / "f").write_bytes(events(1))
        with pytest.raises((DatapipeError, OSError)):
            await stubbed(Stub(), *named)
    assert capsys.readouterr().out == ""
    await stubbed(Stub(), tmp_path / "f")
    assert capsys.readouterr().out.startswith("sent 1: 1 accepted")


async def test_a_folder_that_takes_no_state_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(events(1))
    (tmp_path / "f.datapipe-sent.new").mkdir()  # as root, who may write anywhere
    stub = Stub()
    with pytest.raises(DatapipeError, match="--state names another"):
        await stubbed(stub, tmp_path / "f")
    assert stub.posts == 0


async def test_a_run_that_died_forgets_no_refusal_and_tells_none_twice(tmp_path: Path) -> None:
    file, port = tmp_path / "f", free_port()
    file.write_bytes(b"1\n" + events(10))
    assert await stubbed(Stub(one_refused), file, port=port) == 1
    refused = tmp_path / "f.refused"
    told = refused.read_bytes()
    assert [json.loads(line)["line"] for line in told.splitlines()] == [1, 2]
    behind = {"whole": False, "behind": {"a": Mark()}, "done": Mark()}
    for left in (told, told[:-5]):  # it died before it could say how far it was; while it told
        remember(tmp_path / "f.datapipe-sent", **behind)
        refused.write_bytes(left)
        assert await stubbed(Stub(one_refused), file, port=port) == 1
        assert refused.read_bytes() == left.removesuffix(b"\n") + b"\n" + (
            b"" if left == told else told.splitlines(keepends=True)[1]
        )
