"""The alert rules, on metrics scraped from services: each fires in its fault, and in no other.

Prometheus's clock is the test's: a scrape and an evaluation each minute, which takes milliseconds.
What the services do in between is real.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import psycopg2
import pytest
import yaml

from tests.docs.pages import ROOT
from tests.docs.promql import Prometheus, Rule, rendered
from tests.postgres import Postgres
from tests.service import Service, until

Make = Callable[..., Service]
Act = Callable[[], Awaitable[object]]
STEP_S = 60


def rules() -> list[Rule]:
    content = yaml.safe_load((ROOT / "docs" / "alerts.yml").read_text())
    return [Rule.of(rule) for group in content["groups"] for rule in group["rules"]]


def install(user: object, **more: object) -> dict[str, object]:
    return {"event_name": "install", "user_id": user, "timestamp": 1, **more}


class Watch:
    """Prometheus with our rules, and the services that it scrapes, by the name of their instance.

    Attributes: said: the annotations of what fires.
    """

    def __init__(self, **services: Service) -> None:
        self.prometheus = Prometheus(rules())
        self.said: dict[str, list[str]] = {}
        self._services = services

    async def minutes(self, minutes: float, act: Act | None = None) -> set[str]:
        """All that fire at some moment of these minutes; `act` is done before each scrape."""
        fired: set[str] = set()
        for _ in range(int(minutes * 60 / STEP_S)):
            fired |= await self._step(act)
        return fired

    async def until(self, *alerts: str, act: Act | None = None, most: float = 40) -> float:
        """Minutes until just these fire. Raises: AssertionError: they don't, or others do."""
        start, before = self.prometheus.now, set(self.said)
        while (fired := await self._step(act)) != set(alerts):
            assert fired <= before | set(alerts), self.said
            assert self.prometheus.now - start < most * 60, f"after {most} minutes: {self.said}"
        return (self.prometheus.now - start) / 60

    async def _step(self, act: Act | None) -> set[str]:
        self.prometheus.now += STEP_S
        if act is not None:
            await act()
        for name, service in self._services.items():
            self.prometheus.scrape(name, await metrics(service))
        self.said = self.prometheus.firing()
        return set(self.said)


async def metrics(service: Service) -> str | None:
    """What it shows; None if nobody answers."""
    try:
        async with service.session.get(f"{service.url}/metrics") as response:
            return await response.text()
    except aiohttp.ClientConnectionError:
        return None


async def becomes(service: Service, state: str) -> None:
    async def it_is() -> bool:
        return bool((await service.status())["summary"]["state"] == state)

    await until(it_is, what=state)


async def test_nothing_fires_while_all_is_well(database: str, make_service: Make) -> None:
    service = await make_service(database_url=database).start()
    watch = Watch(web1=service)

    async def traffic() -> None:
        await service.post([install(user) for user in range(60)] + [install("x"), {}])

    assert await watch.minutes(32, traffic) == set(), watch.said


async def test_the_database_stops_and_the_journal_fills_up(
    own_postgres: Postgres, make_service: Make
) -> None:
    service = make_service(database_url=own_postgres.create_database(), journal_max_bytes=100_000)
    await service.start()
    watch = Watch(web1=service)
    assert await watch.minutes(2, lambda: service.post(install(1))) == set()
    await service.drained()
    own_postgres.stop()
    await service.post(install(2))
    await becomes(service, "database_down")
    assert await watch.until("DatapipeDatabaseDown") == 6
    assert "web1 can not load" in watch.said["DatapipeDatabaseDown"][0]

    async def fill() -> int:
        crash = {**install(3), "event_name": "crash_report", "message": "x" * 4000}
        return (await service.post(crash))[0]

    while (await service.status())["mirror"]["used"] <= 0.8:
        assert await fill() == 200
    known = ["DatapipeDatabaseDown", "DatapipeMirrorNearlyFull"]
    assert await watch.until(*known) == 6
    while await fill() != 503:
        pass
    known += ["DatapipeRefusesForWantOfRoom"]
    assert 5 < await watch.until(*known, act=fill) <= 8
    own_postgres.start()
    await service.drained()
    await watch.until(most=7)


async def test_a_blocked_type_and_a_dead_letter(
    database: str, postgres: Postgres, make_service: Make
) -> None:
    """Shown by two instances, as where machines share one queue: each is said once."""
    service = await make_service(database_url=database).start()
    watch = Watch(web1=service, web2=service)

    async def told_once(alert: str) -> str:
        assert await watch.until(alert) == 2
        (said,) = watch.said[alert]
        return said

    await service.post(install(1))
    await service.drained()
    postgres.execute(database, "ALTER TABLE install ADD CHECK (user_id < 2)")
    await service.post(install(2))
    await becomes(service, "dead_letters")
    assert "type install" in await told_once("DatapipeDeadLetters")
    await service.session.post(f"{service.url}/dead/drop", json={"all": True})
    await becomes(service, "healthy")
    assert await watch.until() == 1
    postgres.execute(database, "ALTER TABLE install RENAME TO old")
    postgres.execute(database, "CREATE VIEW install AS SELECT 1 AS user_id")
    await service.post(install(3))
    await becomes(service, "lane_blocked")
    assert "type install is blocked" in await told_once("DatapipeLaneBlocked")


async def test_much_is_rejected(database: str, make_service: Make) -> None:
    service = await make_service(database_url=database).start()
    watch = Watch(web1=service)
    good, bad = [install(user) for user in range(60)], [install("x")] * 8
    await watch.minutes(15, lambda: service.post(good))
    after = await watch.until("DatapipeManyRejected", act=lambda: service.post(good + bad))
    assert 15 < after < 30
    assert "(bad_value)" in watch.said["DatapipeManyRejected"][0]


async def test_one_of_two_is_gone_and_comes_back(database: str, make_service: Make) -> None:
    services = [make_service(database_url=database, data_dir=name) for name in ("a", "b")]
    for service in services:
        await service.start()
    watch = Watch(web1=services[0], web2=services[1])
    assert await watch.minutes(6) == set()
    await services[1].kill()
    assert await watch.until("DatapipeGone") == 3
    (said,) = watch.said["DatapipeGone"]
    assert said.startswith("web2 does not answer")
    await services[1].start()
    assert await watch.until() == 1


async def test_prometheus_scrapes_none() -> None:
    watch = Watch()
    assert await watch.until("DatapipeNotScraped") == 6


async def test_the_journal_can_not_be_written(
    database: str, make_service: Make, tmp_path: Path
) -> None:
    modules = ["tests.fault.modules.read_only"]
    service = await make_service(database_url=database, event_modules=modules).start()
    watch = Watch(web1=service)
    assert await watch.minutes(2, lambda: service.post(install(1))) == set()
    await service.drained()
    flag = tmp_path / "var" / "journal" / "read-only"
    flag.touch()
    assert (await service.post(install(2)))[0] == 503
    assert await watch.until("DatapipeMirrorDown") == 2
    flag.unlink()
    assert await watch.until(act=lambda: service.post(install(2))) == 1


async def test_a_type_falls_behind(
    database: str, postgres: Postgres, make_service: Make, tmp_path: Path
) -> None:
    """What somebody's lock holds up has waited for an hour, as the journal says."""
    service = await make_service(database_url=database, load_interval=300).start()
    await service.post(install(1))
    assert (await service.load())["loaded"] == {"install": 1}
    await service.post(install(2))
    await service.kill()
    journal(tmp_path, "UPDATE segments SET created_at = created_at - 3600")
    other = psycopg2.connect(database)
    other.cursor().execute("LOCK TABLE install")
    try:
        await service.start()
        watch = Watch(web1=service)
        assert await watch.until("DatapipeFallsBehind") == 6
        assert "type install has waited" in watch.said["DatapipeFallsBehind"][0]
    finally:
        other.close()
    await service.drained()
    assert await watch.until() == 1


async def test_events_are_not_accounted_for(
    postgres: Postgres, make_service: Make, tmp_path: Path
) -> None:
    """While the database is not there yet, somebody deletes what waits in the journal alone."""
    name = f"later{uuid4().hex[:10]}"
    service = make_service(database_url=postgres.url(name), buffer_max_bytes=0)
    await service.start()
    watch = Watch(web1=service)
    assert await watch.minutes(3, lambda: service.post(install(1))) == set()
    journal(tmp_path, "DELETE FROM segments")
    postgres.execute(postgres.url("postgres"), f"CREATE DATABASE {name}")
    await becomes(service, "unbalanced")
    assert await watch.until("DatapipeBooksDoNotBalance") == 3
    assert "type install is accounted for on web1" in watch.said["DatapipeBooksDoNotBalance"][0]


def journal(folder: Path, sql: str) -> None:
    """Change the only journal of this folder behind the service's back."""
    (path,) = (folder / "var" / "journal").glob("*.sqlite")
    connection = sqlite3.connect(path, isolation_level=None)
    assert connection.execute(sql).rowcount > 0
    connection.close()


def test_every_alert_is_tried() -> None:
    tried = Path(__file__).read_text()
    assert [rule.alert for rule in rules() if f'"{rule.alert}"' not in tried] == []


# --- what they are evaluated with ---

_SCRAPES = (  # at 0, 30, 60, 90 and 120 s, of two instances; at 90 `b` starts anew
    ('n_total{l="x"} 10', 'n_total{l="x"} 0'),
    ('n_total{l="x"} 10', 'n_total{l="x"} 30'),
    ('n_total{l="x"} 10', 'n_total{l="x"} 60'),
    ('n_total{l="x"} 10', 'n_total{l="x"} 30'),
    ('n_total{l="x"} 10\ng 0', 'n_total{l="x"} 60\ng 3'),
)
_A, _B = {"job": "j", "instance": "a"}, {"job": "j", "instance": "b"}
_X = {"l": "x"}


def known() -> Prometheus:
    prometheus = Prometheus(job="j")
    for number, texts in enumerate(_SCRAPES):
        prometheus.now = number * 30.0
        for instance, text in zip("ab", texts, strict=True):
            types = "# TYPE n counter\n" + text + "\n"
            prometheus.scrape(instance, types)
    return prometheus


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 - 3 * 2", -5.0),
        ("(1 - 3) * 2", -4.0),
        ("1 / 0", math.inf),
        ("up", [(_A, 1), (_B, 1)]),
        ('n_total{instance="b"}', [(_B | _X, 60)]),
        ('n_total{instance!="b",nothing=""}', [(_A | _X, 10)]),
        ("sum(n_total)", [({}, 70)]),
        ("sum by (l) (n_total)", [(_X, 70)]),
        ("max without (instance, l) (n_total)", [({"job": "j"}, 60)]),
        ("n_total > 10", [(_B | _X, 60)]),
        ("n_total == 10", [(_A | _X, 10)]),
        ("g / g > 0", [(_B, 1)]),  # 0 / 0 is no number
        ("n_total - g", []),  # their labels differ
        ("10 * g", [(_A, 0), (_B, 30)]),
        ("rate(n_total[2m])", [(_A | _X, 0), (_B | _X, 1)]),  # with what was before it began anew
        ("rate(g[2m])", []),  # one sample tells of no rate
        ("scalar(sum(n_total))", 70.0),
        ('absent(n_total{l="y"})', [({"l": "y"}, 1)]),
        ("absent(n_total)", []),
    ],
)
def test_expressions_are_evaluated(expression: str, value: Any) -> None:
    if isinstance(value, list):
        value = {frozenset(labels.items()): number for labels, number in value}
    assert known().ask(expression) == value


def test_a_rate_reaches_to_the_ends_of_its_range() -> None:
    """30 in 30 s are 1 a second, wherever in the range the two scrapes were; but not below 0."""
    prometheus = Prometheus()
    for at, total in ((100.0, 1000), (130.0, 1030)):
        prometheus.now = at
        prometheus.scrape("a", f"# TYPE n counter\nn_total {total}\n")
    prometheus.now = 140.0
    (value,) = prometheus.ask("rate(n_total[1m])").values()  # type: ignore[union-attr]
    assert value == pytest.approx(30 * (30 + 20 + 10) / 30 / 60)
    (value,) = prometheus.ask("rate(n_total[5m])").values()  # type: ignore[union-attr]
    assert value == pytest.approx(30 * (30 + 15 + 10) / 30 / 300)


def test_what_ends_is_gone_at_once_and_what_nobody_scrapes_after_five_minutes() -> None:
    prometheus = known()
    prometheus.now += 30
    prometheus.scrape("a", None)
    assert prometheus.ask("up") == {frozenset(_A.items()): 0, frozenset(_B.items()): 1}
    assert prometheus.ask("g") == {frozenset(_B.items()): 3}
    prometheus.now += 270
    assert prometheus.ask("g") == {}


@pytest.mark.parametrize(
    "expression",
    [
        "avg(g)", "topk(1, g)", "g + g", "g < 3", "3 > g", "g or up", "g * on (job) up", "-g",
        "g offset 5m", "irate(g[5m])", "rate(g[5m:1m])", "scalar(g) == bool 1", 'g{l=~"x"}',
    ],
)  # fmt: skip
def test_what_no_rule_uses_is_told(expression: str) -> None:
    with pytest.raises(NotImplementedError):
        known().ask(expression)


@pytest.mark.parametrize("text", ["{{ $labels.pod }}", "{{ $value | humanise }}", "{{ $x }}"])
def test_annotations_that_nobody_could_fill_are_told(text: str) -> None:
    with pytest.raises(AssertionError):
        rendered(text, frozenset(_A.items()))
    assert rendered("{{ $labels.job }}: {{ $value | humanize }}", frozenset(_A.items())) == "j: N"
