"""What `datapipe status` prints of processes on several machines."""

from __future__ import annotations

import argparse
import errno
import os
import time
from types import SimpleNamespace
from typing import Any

import pytest

from datapipe import testing
from datapipe.cli import commands, serve
from datapipe.cli.terminal import show_status
from datapipe.errors import DatapipeError, Reason
from datapipe.monitor import formats
from datapipe.settings import Settings
from tests.doubles.shared_books import share


async def test_a_shared_mirror_has_its_own_equation(capsys: pytest.CaptureFixture[str]) -> None:
    async with testing.service(load_interval=300) as service:
        status = service.pipeline.status
        await service.post([{"event_name": "install", "user_id": 1, "timestamp": 2}] * 3)
        share(status)
        status._others.answers = [await status.for_peers()] * 2
        status._others.silent = ["web2:4711"]
        capsys.readouterr()
        show_status(status.snapshot())
        older = status.snapshot()
        del older["database"]["product"]
        show_status(older)
    said = capsys.readouterr().out
    assert "\nNATS: up, " in said
    assert "\ndatabase: the database " in said
    assert "\ndatabase: version " in said
    table = [line.split() for line in said.splitlines() if "  " in line]
    install = next(row for row in table if row[0] == "install")
    books = [
        "taken",
        "loaded",
        "duplicate",
        "dead",
        "returned",
        "in",
        "hand",
        "accepted",
        "waiting",
    ]
    assert table[0][: len(books) + 1] == ["type", *books]
    assert install[:9] == ["install", "15", "0", "0", "0", "6", "9", "9", "1,003"]


async def test_processes_are_counted_and_the_silent_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with testing.service() as service:
        others = service.pipeline.status._others
        one = await service.pipeline.status.for_peers()
        shown = []
        for others.answers, others.silent in (
            ((), ()), ((), ["web2:4711"]), ([one], ()), ([one], ["web2:4711", "web3:12"]),
        ):  # fmt: skip
            capsys.readouterr()
            show_status(service.pipeline.status.snapshot())
            shown.append(capsys.readouterr().out.splitlines()[-1].split(", ", 2)[2:])
    assert shown == [
        [], ["1 process, silent: web2:4711"], ["2 processes"],
        ["2 processes, silent: web2:4711, web3:12"],
    ]  # fmt: skip


async def test_why_a_type_is_blocked_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    why = "table install: has no column received_at."
    async with testing.service(load_interval=300) as service:
        lane = service.pipeline.buffer.lane("install")
        lane.blocked = why
        lane.health.fails(time.perf_counter(), "what came after it")
        shown = service.pipeline.status.snapshot()
        capsys.readouterr()
        show_status(shown)
        told, *rest = capsys.readouterr().out.splitlines()
        assert told.startswith(f"Event type install is blocked (since {shown['now'][11:16]} UTC): ")
        assert f"{why} Its events are kept, 0 waiting." in told
        assert [line for line in rest if "received_at" in line] == []
        (row,) = (line.split() for line in rest if line.startswith("install "))
        assert row[-1] == "blocked"
        shown["summary"] = {"state": "lane_blocked", "text": "Three others.", "also": []}
        show_status(shown)
        (row,) = (line for line in capsys.readouterr().out.splitlines() if "install " in line)
        assert row.endswith(f"blocked: {why}")


async def test_of_many_types_those_without_events_are_only_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    events = {f"type_{number:02}": {"user_id": "int"} for number in range(18)}
    async with testing.service(load_interval=300, events=events) as service:
        await service.post({"event_name": "type_07", "user_id": 1})
        service.pipeline.buffer.lane("type_08").blocked = "why"
        shown = service.pipeline.status.snapshot()
        capsys.readouterr()
        show_status(shown)
        said = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in said if line.startswith("type_")] == [
            "type_07", "type_08",
        ]  # fmt: skip
        assert "19 more types had no events since the start" in said
        del shown["lanes"]["install"]  # 20 are few enough to be shown
        show_status(shown)
        said = capsys.readouterr().out.splitlines()
        assert len([line for line in said if line.startswith("type_")]) == 18


@pytest.mark.parametrize(
    ("state", "code"),
    [("healthy", 0), ("starting", 0), ("recovering", 0), ("database_down", 1), ("dead_letters", 1)],
)
async def test_what_passes_by_itself_is_no_failure(
    state: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with testing.service() as service:
        shown = service.pipeline.status.snapshot()
        shown["summary"]["state"] = state

        async def found(*_: object, **__: object) -> list[dict[str, object]]:
            return [{"pid": 1, "address": "", "status": shown}]

        monkeypatch.setattr(commands, "services", found)
        args = argparse.Namespace(url=None, json=False)
        assert await commands.status(Settings(), args) == code


def test_every_reason_has_its_words() -> None:
    assert set(formats.REASONS) == {reason.label for reason in Reason}


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EADDRINUSE, "is taken"), (errno.EACCES, "needs CAP_NET_BIND_SERVICE"),
     (errno.EADDRNOTAVAIL, "can't listen on")],
)  # fmt: skip
async def test_a_port_that_is_not_to_be_had(number: int, words: str) -> None:
    def listening(_: Settings) -> Any:
        raise OSError(number, os.strerror(number))

    port: Any = SimpleNamespace(listening=listening)
    with pytest.raises(DatapipeError, match=words):
        async with serve._listening(port, Settings(port=80)):
            pass
