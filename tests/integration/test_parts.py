"""No part of the service can hang or fail while the page says that it is healthy.

The service is real; database and mirror are in memory, and the clock is simulated.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from datapipe import health
from datapipe.app import PIPELINE, Pipeline, create_app, create_runner
from datapipe.errors import LaneBlocked, MirrorUnavailable, SinkUnavailable
from datapipe.events.segment import Chunk
from datapipe.health import Health
from datapipe.http.assets import Templates
from datapipe.mirrors import Appended
from datapipe.monitor.metrics import Metrics
from datapipe.monitor.overview import View
from datapipe.pipeline import coordinator
from datapipe.settings import Settings
from tests.doubles.memory_database import MemoryDatabase
from tests.doubles.virtual_time import VirtualTime

EVENT = b"1\t2\t2026-01-01T00:00:00Z\n"
AWAY = MirrorUnavailable("away")


@dataclass
class Running:
    """A service on which an event has been taken, and loaded within 5 s."""

    pipeline: Pipeline
    mirror: Any
    store: Any
    sink: Any
    database: MemoryDatabase
    made: list[Health]

    async def post(self) -> None:
        kind = self.pipeline.registry.types["install"]
        await self.pipeline.buffer.append([Chunk("install", kind.columns, EVENT, 1)])

    def state(self) -> str:
        return str(self.pipeline.status.snapshot()["summary"]["state"])

    def mirror_state(self, **changes: Any) -> None:
        state = replace(self.mirror.state(), **changes)
        self.mirror.state = lambda: state


@contextlib.asynccontextmanager
async def running(folder: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    made: list[Health] = []
    original = Health.__init__

    def noted(self: Health, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(Health, "__init__", noted)
    database = MemoryDatabase()
    monkeypatch.setattr(coordinator, "_TABLES_S", 5.0)
    kept = {"install": {"user_id": "int", "timestamp": "int", "@retention": "1 day"}}
    settings = Settings(
        data_dir=str(folder), mirror="none", load_interval=1, host="127.0.0.1", events=kept
    )
    app = create_app(settings, open_sink=database.open)
    runner = create_runner(app)
    await runner.setup()
    try:
        pipeline = app[PIPELINE]
        mirror: Any = pipeline.buffer.mirror
        found = Running(pipeline, mirror, mirror._store, pipeline.loader.sink, database, made)
        await found.post()
        await asyncio.sleep(10)
        yield found
    finally:
        pipeline._stopped = True
        await runner.cleanup()


def simulated(
    folder: Any, monkeypatch: pytest.MonkeyPatch, check: Callable[[Running], Any]
) -> None:
    class Clock:
        time, perf_counter = staticmethod(time.time), staticmethod(time.perf_counter)

        @staticmethod
        def monotonic() -> float:
            return asyncio.get_running_loop().time()

    async def main() -> None:
        async with running(folder, monkeypatch) as service:
            assert service.state() == "healthy"
            await check(service)

    monkeypatch.setattr(health, "time", Clock)
    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        runner.run(main())


async def hang(*_: Any, **__: Any) -> Any:
    await asyncio.Event().wait()


def raising(error: Exception) -> Callable[..., Any]:
    async def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


async def refused(*_: Any) -> Appended:
    return Appended((), AWAY)


def breaks(owner: str, method: str, how: Callable[..., Any]) -> Callable[[Running], None]:
    return lambda service: setattr(getattr(service, owner), method, how)


def stops(service: Running) -> None:
    service.pipeline.buffer.stopping = True


def loses_an_event(service: Running) -> None:
    service.pipeline.buffer.lane("install").accepted += 1


def goes_away(service: Running) -> None:
    service.database.up = False


def hears_nothing(service: Running) -> None:
    others = service.pipeline.status._others
    others.silent, others.at = ["web2:4711"], time.monotonic()


def hears_of_an_end(service: Running) -> None:
    others = service.pipeline.status._others
    others.ended, others.at = ["web2:4711"], time.monotonic()


async def two_dead() -> dict[str, int]:
    return {"install": 2}


def no_room(_lanes: Any) -> dict[str, str]:
    return {f"lane_{number}": f"no room for lane_{number}" for number in range(5)}


HANGS = {
    "append": breaks("mirror", "append", hang),
    "load": breaks("sink", "load", hang),
    "removal": breaks("store", "remove", hang),
    "recovery": breaks("mirror", "recover", hang),
    "heartbeat": breaks("sink", "heartbeat", hang),
    "upkeep": breaks("mirror", "keep", hang),
    "count": breaks("sink", "count_dead", hang),
    "tables": breaks("sink", "remove_expired", hang),
}
FAILS = {
    "ingest": (stops, "refusing"),
    "database": (goes_away, "database_down"),
    "mirror": (lambda service: service.mirror_state(up=False, error="x"), "refusing"),
    "books": (loses_an_event, "unbalanced"),
    "room": (lambda service: service.mirror_state(bytes=9, max_bytes=10), "nearly_full"),
    "shares": (breaks("mirror", "full", no_room), "lane_full"),
    "leftovers": (lambda service: service.mirror_state(left=20, left_s=60.0), "recovering"),
    "peers": (hears_nothing, "process_silent"),
    "append": (breaks("mirror", "append", refused), "refusing"),
    "load": (breaks("sink", "load", raising(SinkUnavailable("no"))), "lane_failing"),
    "removal": (breaks("store", "remove", raising(RuntimeError("no"))), "removal_failing"),
    "recovery": (breaks("mirror", "recover", raising(AWAY)), "recovery_failing"),
    "heartbeat": (breaks("sink", "heartbeat", raising(LaneBlocked("no"))), "heartbeat_failing"),
    "upkeep": (breaks("mirror", "keep", raising(AWAY)), "upkeep_failing"),
    "count": (breaks("sink", "count_dead", raising(LaneBlocked("no"))), "count_failing"),
    "dead_letters": (breaks("sink", "count_dead", two_dead), "dead_letters"),
    "ended": (hears_of_an_end, "process_ended"),
    "tables": (breaks("sink", "make_ahead", raising(LaneBlocked("no"))), "tables_failing"),
}


async def after_a_post(service: Running) -> str:
    post = asyncio.create_task(service.post())
    service.pipeline.coordinator._look_now.set()  # it would look within the hour
    await asyncio.sleep(25)
    post.cancel()
    await asyncio.gather(post, return_exceptions=True)
    return service.state()


@pytest.mark.parametrize("part", HANGS)
def test_a_part_that_hangs_is_named(
    part: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(service: Running) -> None:
        HANGS[part](service)
        state = await after_a_post(service)
        # an append that hangs is given up, too: then events are refused
        expected = {"load": "lane_slow", "append": "refusing"}.get(part, f"{part}_slow")
        assert state == expected

    simulated(tmp_path, monkeypatch, check)


@pytest.mark.parametrize("part", FAILS)
def test_a_part_that_fails_is_named(
    part: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(service: Running) -> None:
        breaking, expected = FAILS[part]
        breaking(service)
        assert await after_a_post(service) == expected
        shown = [each for each in service.pipeline.status.parts() if each.part == part]
        assert any(each.up is False for each in shown), part

    simulated(tmp_path, monkeypatch, check)


def test_no_part_is_forgotten(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever keeps a health is shown, and is broken above."""

    async def check(service: Running) -> None:
        shown = list(service.pipeline.status.parts())
        # what a mirror or a sink keeps is shown by its `state`
        assert {id(each) for each in service.made if each.part} == set(map(id, shown))
        assert {each.part for each in shown} == FAILS.keys()
        assert {each.part for each in shown if each.part not in service.pipeline.status._judged} \
            == HANGS.keys()  # fmt: skip

    simulated(tmp_path, monkeypatch, check)


def test_silence_is_forgotten_where_nobody_asks(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the page would say "since" of a time since which nobody knows."""

    async def check(service: Running) -> None:
        hears_nothing(service)
        assert service.state() == "process_silent"
        began = service.pipeline.status._judged["peers"].since
        service.pipeline.status._others.at -= 31
        assert service.state() == "healthy"
        hears_nothing(service)
        assert service.state() == "process_silent"
        assert service.pipeline.status._judged["peers"].since > began

    simulated(tmp_path, monkeypatch, check)


def test_types_without_room_are_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their new events are refused, whatever else is wrong; the first few, and how many more."""

    async def check(service: Running) -> None:
        service.mirror.full = no_room
        service.database.up = False
        await asyncio.sleep(25)
        shown = service.pipeline.status.snapshot()["summary"]
        assert shown["state"] == "database_down"
        assert shown["also"] == [
            f"Some events are refused (since {shown['since'][11:16]} UTC): no room for lane_0; "
            "no room for lane_1; no room for lane_2; and 2 more. They are taken again once some of "
            "their type are loaded; those of other types are taken."
        ]
        service.mirror.full = lambda _: {"install": "no room for install"}
        status = service.pipeline.status
        snapshot = status.snapshot() | {"history": await status.series()}
        rows = Templates().of_view(snapshot, View())["types"]
        assert rows.count("There is no room for it: new events of this type are refused.") == 1

    simulated(tmp_path, monkeypatch, check)


def test_one_queue_that_is_nearly_full_is_named(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each lane's has a limit of its own the mirror's size says too little."""

    async def check(service: Running) -> None:
        for fullest, state in ((0.79, "healthy"), (0.8, "nearly_full"), (0.1, "healthy")):
            service.mirror_state(bytes=9, max_bytes=10, fullest=fullest)
            snapshot = service.pipeline.status.snapshot()
            assert (snapshot["summary"]["state"], snapshot["mirror"]["used"]) == (state, 0.9)
            assert snapshot["mirror"]["fullest"] == fullest
            assert ratio(snapshot) == fullest
        service.mirror_state(fullest=None)
        assert ratio(service.pipeline.status.snapshot()) == 0.9

    def ratio(snapshot: dict[str, Any]) -> float:
        metrics = Metrics()
        shown = metrics.text(snapshot, [metrics.histograms()]).decode()
        found = re.search(r"^datapipe_mirror_used_ratio (\S+)$", shown, re.MULTILINE)
        assert found
        return float(found[1])

    simulated(tmp_path, monkeypatch, check)
