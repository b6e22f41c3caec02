"""`datapipe send` to a service: each line of a file is a row once, whatever ends in the middle."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from backports import zstd

from datapipe.cli import main
from datapipe.cli.send import client, cut
from datapipe.errors import ConfigError
from datapipe.settings import Settings
from tests.ports import free_port
from tests.postgres import Postgres
from tests.service import LINE_BYTES, Service, until, zygote
from tests.wire import crash, lines, purchase, running
from tests.zygote import Forked

shared = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(
    tmp_path_factory: pytest.TempPathFactory, database_url: str
) -> AsyncIterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    async with running(folder, database_url=database_url, ingest_keys=["KEY"]) as made:
        yield made


async def send(*words: object, **settings: Any) -> int:
    """Run the command in this process; its exit code. Raises: what `main` makes a line of."""
    args = main._parser().parse_args(["send", *map(str, words)])
    code: int = await args.command(Settings(ingest_keys=["KEY"], **settings), args)
    return code


def mixed(label: str, count: int) -> list[dict[str, Any]]:
    """Events of two types in turn, told apart by `user_id`."""
    return [(purchase if i % 2 else crash)(label, user_id=i) for i in range(count)]


async def stored(service: Service, postgres: Postgres, label: str) -> list[int]:
    """The `user_id` of each row with this label, in order."""
    await service.load()
    found: list[int] = []
    for table, column in (("crash_report", "message"), ("purchase", "sku")):
        sql = f"SELECT user_id FROM {table} WHERE {column} = %s"
        rows = await postgres.aexecute(service.settings["database_url"], sql, label)
        found += [user for (user,) in rows]
    return sorted(found)


def as_array(events: Iterable[object]) -> bytes:
    return json.dumps(list(events), indent=1).encode()


FORMS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "ndjson": lambda events: lines(*events),
    "array": as_array,
    "crlf, blank lines, bom, no end": lambda events: (
        b"\xef\xbb\xbf" + lines(*events).replace(b"\n", b"\r\n\r\n").rstrip()
    ),
    "gzip": lambda events: (
        gzip.compress(lines(*events[:999])) + gzip.compress(lines(*events[999:]))
    ),
    "zstd": lambda events: zstd.compress(as_array(events)),
}


@shared
@pytest.mark.parametrize("form", FORMS)
async def test_each_line_is_a_row_once(
    service: Service, postgres: Postgres, tmp_path: Path, capsys: Any, form: str
) -> None:
    file = tmp_path / "events"  # its name says nothing
    file.write_bytes(FORMS[form](mixed(form, 2500)))
    assert await send(file, "--url", service.url) == 0
    assert "sent 2,500: 2,500 accepted, 0 rejected; " in capsys.readouterr().out
    assert await send(file, "--url", service.url) == 0
    said = capsys.readouterr()
    assert "sent 0: " in said.out  # it knows
    assert "nothing new since it was sent" in said.err
    assert await send(file, "--again", "--url", service.url) == 0
    assert "sent 2,500: " in capsys.readouterr().out
    (tmp_path / "events.datapipe-sent").unlink()
    assert await send(file, "--url", service.url) == 0
    assert "sent 2,500: " in capsys.readouterr().out
    assert await stored(service, postgres, form) == list(range(2500))


@shared
async def test_standard_input_wants_an_id_and_repeats_add_no_row(
    service: Service, postgres: Postgres, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    events = tmp_path / "events"
    events.write_bytes(lines(*mixed("stdin", 1500)))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with events.open() as file:
            monkeypatch.setattr(sys, "stdin", file)
            assert await send("-", "--url", service.url, "--id", "a/1") == 0
            assert "sent 1,500: 1,500 accepted" in capsys.readouterr().out
    with events.open() as file, pytest.raises(ConfigError, match="--id"):
        monkeypatch.setattr(sys, "stdin", file)
        await send("-", "--url", service.url)
    assert await stored(service, postgres, "stdin") == list(range(1500))
    assert list(tmp_path.iterdir()) == [events]


@shared
async def test_what_is_refused_stands_in_a_file(
    service: Service, postgres: Postgres, tmp_path: Path, capsys: Any
) -> None:
    events: list[Any] = mixed("bad", 2000)
    events[7] = crash(label := "bad", user_id="x")
    events[8] = b"{no json"
    events[1000] = {"event_name": "nobody", "label": label}
    events[1001] = b'{"event_name": "crash_report", "message": "\xff"}'
    events[1002] = [1]
    events[1003] = {"event_name": 5}
    file = tmp_path / "events.ndjson"
    file.write_bytes(lines(*events))
    assert await send(file, "--url", service.url) == 1
    said = capsys.readouterr()
    assert "1,994 accepted, 6 rejected (bad_json 3, bad_value 2, unsupported_event 1)" in said.out
    refused = tmp_path / "events.ndjson.refused"
    assert f"6 rejected, see {refused}" in said.err
    told = sorted(
        (json.loads(line) for line in refused.read_text().splitlines()),
        key=lambda each: each["line"],
    )
    assert [each["line"] for each in told] == [8, 9, 1001, 1002, 1003, 1004]
    assert [each["status_code"] for each in told] == [5, 3, 7, 3, 3, 5]
    assert "user_id: must be int (64 bits): " in told[0]["status_message"]
    assert told[0]["event"] == events[7]
    assert told[1]["event"] == "{no json"
    assert len(await stored(service, postgres, label)) == 1994
    # mended, they are sent as any other file
    mended = tmp_path / "mended.ndjson"
    mended.write_bytes(lines(*(each["event"] | {"user_id": 7} for each in told[:1])))
    assert await send(mended, "--url", service.url) == 0
    assert len(await stored(service, postgres, label)) == 1995


@shared
async def test_a_file_that_grows_goes_on_where_it_ended(
    service: Service, postgres: Postgres, tmp_path: Path, capsys: Any
) -> None:
    file, events = tmp_path / "log", lines(*mixed("grows", 3000))
    for end, code in ((6_000, 1), (150_000, 1), (len(events), 0)):
        file.write_bytes(events[:end])
        capsys.readouterr()
        assert await send(file, "--url", service.url) == code
        said = capsys.readouterr()
        assert ("its last line is incomplete" in said.err) == bool(code)
    assert await stored(service, postgres, "grows") == list(range(3000))
    # as it was cut then it is cut again
    assert await send(file, "--url", service.url, "--again") == 0
    assert "sent 3,000: " in capsys.readouterr().out
    assert await stored(service, postgres, "grows") == list(range(3000))
    # another file has taken its name
    file.write_bytes(lines(*mixed("rotated", 10)))
    assert await send(file, "--url", service.url) == 0
    assert await stored(service, postgres, "rotated") == list(range(10))


async def test_sender_and_service_are_killed_while_the_file_grows(
    make_service: Callable[..., Service], database: str, postgres: Postgres, tmp_path: Path
) -> None:
    service = make_service(
        database_url=database, port=free_port(), load_interval=0.1, mirror_linger_ms=100
    )  # fmt: skip
    await service.start()
    file = tmp_path / "events.gz"
    data = lines(*mixed("killed", 50_000))
    half = data.index(b"\n", len(data) // 2) + 1
    file.write_bytes(gzip.compress(data[:half], 1))

    async def start() -> Forked:
        words = ["send", str(file), "--url", service.url, "--parallel", "1"]
        return await zygote().start(words, dict(os.environ), tmp_path, LINE_BYTES)

    async def accepted(least: int) -> None:
        async def enough() -> bool:
            return bool((await service.status())["books"]["accepted"] >= least)

        await until(enough, what=f"{least} accepted")

    sender = await start()
    await accepted(2000)
    await service.kill()
    await service.start()
    await accepted(4000)
    sender.send_signal(signal.SIGKILL)
    assert await sender.wait() == -signal.SIGKILL
    file.write_bytes(file.read_bytes() + gzip.compress(data[half:], 1))
    sender = await start()
    await accepted(8000)
    sender.send_signal(signal.SIGINT)
    assert await sender.wait() == 1
    sender = await start()
    assert await sender.wait() == 0
    assert await stored(service, postgres, "killed") == list(range(50_000))


async def test_a_full_lane_holds_up_its_own_alone(
    make_service: Callable[..., Service],
    database: str,
    postgres: Postgres,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cut, "_BLOCK_ITEMS", 2000)
    monkeypatch.setattr(cut, "_PIECE_ITEMS", 100)
    monkeypatch.setattr(client, "_seconds", lambda text: text and 0.2)  # the service says 5
    postgres.execute(database, "CREATE TABLE purchase (sku text)")  # not ours: the lane is blocked
    service = make_service(
        database_url=database, journal_max_bytes=4_000_000, load_interval=0.1, ingest_keys=["KEY"]
    )
    await service.start()
    file = tmp_path / "events.ndjson"
    long = "full" * 500
    events = [crash("full", i) if i % 2 else purchase(long, i) for i in range(6_000)]
    file.write_bytes(lines(*events))
    await service.post(purchase("first"), headers={"Authorization": "Bearer KEY"})

    async def is_blocked() -> bool:
        return bool((await service.status())["lanes"]["purchase"]["blocked"])

    await until(is_blocked, what="a blocked lane")
    sending = asyncio.create_task(send(file, "--url", service.url))

    kept = tmp_path / "events.ndjson.datapipe-sent"

    async def all_others() -> bool:
        assert not sending.done()
        if not kept.exists():
            return False
        state = json.loads(kept.read_bytes())
        return bool(state["reached"]["item"] == 6_000 and state["behind"].keys() == {"purchase"})

    await until(all_others, what="the whole file read, for the other lane")
    postgres.execute(database, "DROP TABLE purchase")
    await service.load()
    assert await sending == 0
    assert await stored(service, postgres, "full") == list(range(1, 6_000, 2))
    assert await stored(service, postgres, long) == list(range(0, 6_000, 2))
