"""A service imports what its settings need and nothing else: most of its idle memory is code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.service import ROOT, Service

MakeService = Callable[..., Service]
CRASH = {"event_name": "crash_report", "user_id": 1, "timestamp": 2, "message": "boom"}
PAGE = {"jinja2", "markupsafe", "datapipe.monitor.charts"}
SCRAPE = {"prometheus_client", "datapipe.monitor.exposition"}
OTHERS = {"importlib.metadata"}  # of entry points
MIRRORS = {
    "datapipe.mirrors.journal.mirror": {"sqlite3", "datapipe.mirrors.journal.file"},
    "datapipe.mirrors.ironmq.mirror": {"datapipe.mirrors.ironmq.client"},
    "datapipe.mirrors.memory": set(),
}
SINKS = {
    "datapipe.sinks.postgres.sink": {"psycopg2", "aiopg", "datapipe.sinks.postgres.copy"},
    "datapipe.sinks.memory": set(),
}
NEEDLESS = {"configparser", "difflib", "logging.handlers", "multiprocessing", "wsgiref", "zipfile"}
REPORT = """
import atexit, json, sys
from pathlib import Path
atexit.register(lambda: Path(__file__).with_name("seen").write_text("\\n".join(sys.modules)))
"""


@pytest.fixture
def make(tmp_path: Path, make_service: MakeService, database: str) -> Callable[..., Service]:
    """Makes a service on PostgreSQL that writes down at its end what it has imported."""
    (tmp_path / "report.py").write_text(REPORT)
    env = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    return lambda **settings: make_service(
        env=env, database_url=database, event_modules=["report"], **settings
    )


async def imported(service: Service, folder: Path, *paths: str) -> set[str]:
    """What a service has imported that took an event, loaded it and answered GETs of these."""
    await service.start()
    assert (await service.post(CRASH))[0] == 200
    await service.drained()
    for path in paths:
        async with service.session.get(f"{service.url}{path}") as response:
            assert response.status == 200, path
    assert await service.stop() == 0
    return set((folder / "seen").read_text().split())


def unlike(chosen: dict[str, set[str]], name: str) -> set[str]:
    """What all but the one of that name bring."""
    needed = {name, *chosen[name]}
    return {each for other, more in chosen.items() for each in (other, *more)} - needed


@pytest.mark.parametrize("mirror", ["journal", "none"])
async def test_what_other_settings_need_is_not_imported(
    make: Callable[..., Service], tmp_path: Path, mirror: str
) -> None:
    name = {"journal": "datapipe.mirrors.journal.mirror", "none": "datapipe.mirrors.memory"}[mirror]
    sink = "datapipe.sinks.postgres.sink"
    seen = await imported(
        make(mirror=mirror), tmp_path, "/status.json", "/healthz", "/openapi.json"
    )
    assert {name, *MIRRORS[name], sink, *SINKS[sink]} <= seen  # so the names here are right
    unwanted = PAGE | SCRAPE | OTHERS | NEEDLESS | unlike(MIRRORS, name) | unlike(SINKS, sink)
    assert sorted(seen & unwanted) == []


@pytest.mark.parametrize(
    ("path", "needed", "not_needed"), [("/", PAGE, SCRAPE), ("/metrics", SCRAPE, PAGE)]
)
async def test_who_shows_it_imports_it(
    make: Callable[..., Service], tmp_path: Path, path: str, needed: set[str], not_needed: set[str]
) -> None:
    seen = await imported(make(), tmp_path, path)
    assert needed <= seen
    assert sorted(seen & not_needed) == []
