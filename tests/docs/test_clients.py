"""The examples of docs/clients.md against a service that is busy, and that loses an answer."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.browser.chromium import chromium
from tests.docs.front import RETRY_AFTER_S, Front, Try, front
from tests.docs.pages import ROOT, read
from tests.postgres import Postgres
from tests.service import Service
from tests.wire import running

shared = pytest.mark.asyncio(loop_scope="module")

CLIENTS = {  # the file of each, and the user whose events it sends
    "send.sh": 1, "send_aiohttp.py": 2, "send_requests.py": 3, "buy.mjs": 4, "page.html": 5,
}  # fmt: skip
STATUS_ALONE = {"send.sh", "send_requests.py"}  # these do not see that a lane is full


@dataclass
class Outcome:
    """What one client did: with a good event through faults, and with one that is refused."""

    tries: list[Try]
    said: str
    refused: list[Try]
    refused_said: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Path, str]]:
    """A folder with all files of the page, and where it is served."""
    folder = tmp_path_factory.mktemp("clients")
    app = web.Application()
    app.router.add_static("/", folder)
    async with TestServer(app) as server:
        yield folder, str(server.make_url("/")).rstrip("/")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(
    tmp_path_factory: pytest.TempPathFactory, postgres: Postgres, site: tuple[Path, str]
) -> AsyncIterator[Service]:
    async with running(
        tmp_path_factory.mktemp("service"), database_url=postgres.create_database(),
        ingest_keys=["KEY"], cors_origins=[site[1]],
    ) as service:  # fmt: skip
        yield service


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def outcomes(service: Service, site: tuple[Path, str]) -> dict[str, Outcome]:
    """All clients at once: they wait most of the time."""
    async with AsyncExitStack() as stack:
        fronts = [await stack.enter_async_context(front(service.url)) for _ in range(10)]
        for name, good in zip(CLIENTS, fronts[:5], strict=True):
            if name not in STATUS_ALONE:
                good.faults.insert(0, "full")
        for refusing in fronts[5:]:
            refusing.faults.clear()
        made = await asyncio.gather(
            *(
                outcome(site, name, good, bad)
                for name, good, bad in zip(CLIENTS, fronts[:5], fronts[5:], strict=True)
            )
        )
    return dict(zip(CLIENTS, made, strict=True))


async def outcome(site: tuple[Path, str], name: str, good: Front, bad: Front) -> Outcome:
    said = await run(site, name, f"good-{CLIENTS[name]}", good.url)
    refused_said = await run(site, name, f"bad-{CLIENTS[name]}", bad.url, good=False)
    return Outcome(good.tries, said, bad.tries, refused_said)


async def run(
    site: tuple[Path, str], name: str, folder: str, url: str, *, good: bool = True
) -> str:
    """Run one file of the page against `url`; what it printed."""
    home = site[0] / folder
    home.mkdir()
    for block in read(ROOT / "docs" / "clients.md").blocks:
        if block.file:
            text = block.text.replace("http://localhost:8080/", url)
            if not good:
                text = text.replace('"tea"', "1").replace("order-4711", "order-4712")
            (home / block.file).write_text(text)
    if name == "page.html":
        return await browse(f"{site[1]}/{folder}/{name}")
    program = {".sh": "bash", ".py": sys.executable, ".mjs": shutil.which("node")}[
        Path(name).suffix
    ]
    assert program, "node is missing: run tools/test-needs"
    process = await asyncio.create_subprocess_exec(
        program, name, cwd=home, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    answer = home / "answer.json"
    return said.decode() + (answer.read_text() if answer.exists() else "")


async def browse(url: str) -> str:
    """Open the page, wait for its title, leave it."""
    async with chromium() as browser:
        page = await browser.new_page()
        await page.goto(url)
        await page.wait_for_function("document.title.startsWith('{')", timeout=60_000)
        title = await page.title()
        await page.goto("about:blank")
        return title


@shared
@pytest.mark.parametrize("name", CLIENTS)
async def test_it_waits_as_told_and_sends_the_same_again(
    outcomes: dict[str, Outcome], name: str
) -> None:
    done = outcomes[name]
    assert len(done.tries) == (3 if name in STATUS_ALONE else 4), done.said
    assert len({(each.key, each.body) for each in done.tries}) == 1
    *told, lost = [after.at - before.at for before, after in pairwise(done.tries)]
    assert min(told) >= RETRY_AFTER_S
    assert lost >= 0.4  # it waits after a lost answer, too
    assert "status_code" in done.said
    assert "ok" in done.said


@shared
@pytest.mark.parametrize("name", CLIENTS)
async def test_what_is_refused_is_not_sent_again(outcomes: dict[str, Outcome], name: str) -> None:
    done = outcomes[name]
    assert len(done.refused) == 1, done.refused_said
    assert "must be str" in done.refused_said


@shared
async def test_each_event_counts_once(
    outcomes: dict[str, Outcome], service: Service, postgres: Postgres
) -> None:
    await service.load()
    books = await service.drained()
    url = service.settings["database_url"]
    sql = "SELECT user_id, count(*) FROM purchase GROUP BY 1 ORDER BY 1"
    assert postgres.execute(url, sql) == [(user, 1) for user in CLIENTS.values()]
    assert books["duplicate"] == len(CLIENTS)  # the answer of each was lost once
    # the beacon of the page that was left
    assert postgres.execute(url, "SELECT DISTINCT user_id FROM install") == [(5,)]
