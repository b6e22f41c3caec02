"""`datapipe.testing`: what a user's test of its own event types sees."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import aiohttp
import pytest

import datapipe.testing
from datapipe.errors import ConfigError
from tests.wire import crash, lines, purchase

ID = "7f8e7a52-32f3-4f9f-9a53-1f1f1f1f1f1f"
ODD = "tab\t line\n back\\slash \\N \u00e9 \u2028"
KINDS: dict[str, tuple[Any, Any]] = {  # as sent, as a Python value
    "int": (-(2**63), -(2**63)),
    "float": (1e-300, 1e-300),
    "str": (ODD, ODD),
    "bool": (False, False),
    "datetime": ("2026-11-22T12:00:00.5+02:00", datetime(2026, 11, 22, 10, 0, 0, 500000, UTC)),
    "date": ("2026-11-22", date(2026, 11, 22)),
    "Decimal": ("19.90", Decimal("19.90")),
    "UUID": (ID, UUID(ID)),
    "dict": ({"a": [1, None, "\n"]}, {"a": [1, None, "\n"]}),
    "list": ([], []),
}  # fmt: skip


async def test_rows_are_python_values_of_the_types_that_were_declared() -> None:
    fields = {f"a_{name.lower()}": name for name in KINDS}
    nullable = {f"a_{name.lower()}": f"{name}?" for name in KINDS}
    async with datapipe.testing.service(events={"every": fields, "none": nullable}) as service:
        event = {f"a_{name.lower()}": sent for name, (sent, _) in KINDS.items()}
        status, answer = await service.post({"event_name": "every", **event})
        assert (status, answer) == (200, {"status_code": 0, "status_message": "ok"})
        assert (await service.post({"event_name": "none"}))[0] == 200
        (row,) = await service.rows("every")
        received_at = row.pop("received_at")
        assert timedelta(0) <= datetime.now(UTC) - received_at < timedelta(minutes=1)
        assert row == {f"a_{name.lower()}": value for name, (_, value) in KINDS.items()}
        assert {type(value) for value in row.values()} == {type(v) for _, v in KINDS.values()}
        (empty,) = await service.rows("none")
        assert set(empty.values()) - {empty["received_at"]} == {None}


async def test_rows_come_in_the_order_of_their_arrival_and_stay() -> None:
    async with datapipe.testing.service() as service:
        assert await service.rows("install") == []
        for user in range(3):
            await service.post(lines(crash("a", user), purchase("b", user)))
            rows = await service.rows("crash_report")
            assert [row["user_id"] for row in rows] == list(range(user + 1))
        assert len(await service.rows("purchase")) == 3
        with pytest.raises(KeyError, match="nope"):
            await service.rows("nope")


async def test_what_is_refused_is_no_row() -> None:
    async with datapipe.testing.service(input_max_len=100) as service:
        status, answer = await service.post([crash(), crash(user_id="x"), crash("m" * 101)])
        assert (status, answer["accepted"], answer["rejected"]) == (207, 1, 2)
        assert [error["status_code"] for error in answer["errors"]] == [5, 6]
        assert (await service.post(b"{"))[1]["status_code"] == 3
        assert len(await service.rows("crash_report")) == 1


async def test_it_is_a_whole_service_for_clients_of_ones_own() -> None:
    async with (
        datapipe.testing.service(ingest_keys=["k"]) as service,
        aiohttp.ClientSession() as session,
    ):
        assert (await service.post(crash()))[0] == 401
        assert (await service.post(crash(), Authorization="Bearer k"))[0] == 200
        body, headers = json.dumps(crash()), {"Authorization": "Bearer k"}
        async with session.post(service.url, data=body, headers=headers) as response:
            assert response.status == 200
        async with session.get(f"{service.url}status.json") as response:
            assert (await response.json())["books"]["accepted"] == 2
        assert len(await service.rows("crash_report")) == 2


async def test_two_at_once_know_nothing_of_each_other() -> None:
    async with datapipe.testing.service() as one, datapipe.testing.service() as two:
        await asyncio.gather(one.post(crash()), two.post([crash(), crash()]))
        assert [len(await each.rows("crash_report")) for each in (one, two)] == [1, 2]


async def test_what_is_wrong_is_told() -> None:
    with pytest.raises(ConfigError, match=r"events\.signup\.n"):
        async with datapipe.testing.service(events={"signup": {"n": "number"}}):
            pass
    with pytest.raises(TypeError, match="lod_interval"):
        async with datapipe.testing.service(lod_interval=1):
            pass
