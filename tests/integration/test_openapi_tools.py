"""What other people's tools make of `/openapi.json`, as a running service serves it."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import pytest_asyncio

from tests.postgres import Postgres
from tests.service import ROOT, Service
from tests.wire import crash, purchase, running

SPECTRAL = ROOT / ".cache/spectral/node_modules/.bin/spectral"
RULES = Path(__file__).with_name("spectral") / "ruleset.yaml"
TYPES = {
    "a": "float", "b": "bool = false", "c": "datetime", "d": "date?", "e": "Decimal", "f": "UUID",
    "g": "dict", "h": "list?", "i": "list[str | None]", "j": "dict[str, list[float]]?",
}  # fmt: skip


def install(user_id: int = 7) -> dict[str, Any]:
    return {"event_name": "install", "user_id": user_id, "timestamp": 1000}


shared = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(
    tmp_path_factory: pytest.TempPathFactory, database_url: str
) -> AsyncIterator[Service]:
    """A table of purchases is there, which holds no long `sku`."""
    sql = "CREATE TABLE purchase (sku varchar(3), received_at timestamptz)"
    Postgres.execute(database_url, sql)
    async with running(
        tmp_path_factory.mktemp("openapi"), database_url=database_url, admin_key="admin",
        ingest_keys=["in", {"name": "ios", "key": "ios", "lanes": ["install"]}],
        inflight_max_bytes=65_536, events={"all_types": TYPES}, unknown_events="keep",
    ) as service:  # fmt: skip
        yield service


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def document(service: Service) -> Path:
    """As it was served."""
    file = service.file.with_name("openapi.json")
    async with service.session.get(f"{service.url}/openapi.json") as response:
        file.write_bytes(await response.read())
    return file


async def run(*command: str | Path, **env: str) -> tuple[int | None, str]:
    """The exit code of a command, and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command, env={"PATH": os.environ["PATH"], **env},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    printed, _ = await process.communicate()
    return process.returncode, printed.decode()


LACKING = {"event_name": "install", "user_id": 7}
BAD = {"event_name": "install", "user_id": "x", "timestamp": 1000}
# path, status and name of an example (if there are several) -> what is sent for it, by whom
EXAMPLES: dict[tuple[str, str, str], tuple[Any, dict[str, str], str]] = {
    ("/", "200", "one"): (install(), {}, "in"),
    ("/", "200", "several"): ([install()] * 2, {}, "in"),
    ("/", "200", "waited"): (install(), {"Prefer": "wait=20"}, "in"),
    ("/", "202", ""): (install(), {"Prefer": "wait=0"}, "in"),
    ("/", "207", "rejected"): ([install(), LACKING], {}, "in"),
    ("/", "400", "empty"): ("", {}, "in"),
    ("/", "400", "malformed"): ("hello", {}, "in"),
    ("/", "400", "missing"): (LACKING, {}, "in"),
    ("/", "400", "value"): (BAD, {}, "in"),
    ("/", "400", "long"): (crash("x" * 17_000), {}, "in"),
    ("/", "400", "several"): ([LACKING], {}, "in"),
    ("/", "401", ""): (install(), {}, "no"),
    ("/", "403", ""): (purchase(), {}, "ios"),
    ("/", "415", ""): (install(), {"Content-Encoding": "br"}, "in"),
    ("/", "422", ""): (install(8), {"Idempotency-Key": "used"}, "in"),
    ("/load", "404", ""): ("", {}, "admin"),
}


@shared
async def test_examples_are_what_is_answered(service: Service, document: Path) -> None:
    whole = json.loads(document.read_text())
    await service.post(install(), headers={"Authorization": "Bearer in", "Idempotency-Key": "used"})
    for (path, status, name), (body, headers, key) in EXAMPLES.items():
        told = whole["paths"][path]["post"]["responses"][status]
        if "$ref" in told:
            told = whole["components"]["responses"][told["$ref"].split("/")[-1]]
        media = told["content"]["application/json"]
        example = media["examples"][name]["value"] if name else media["example"]
        data = body if isinstance(body, str) else json.dumps(body)
        async with service.session.post(
            f"{service.url}{path}", data=data, params={"lane": "instal"} if path == "/load" else {},
            headers={"Authorization": f"Bearer {key}", **headers},
        ) as response:  # fmt: skip
            assert (response.status, await response.json()) == (int(status), example)


def undescribed(node: Any) -> list[str]:
    """Keys of an answer that the description does not name."""
    if isinstance(node, list):
        return [key for each in node for key in undescribed(each)]
    if not attrs.has(type(node)):
        return []
    named = {field.name: getattr(node, field.name) for field in attrs.fields(type(node))}
    others = named.pop("additional_properties")
    below = undescribed([*named.values(), *others.values()])
    return [*others, *below] if named else below  # what names none is a table by name


@shared
async def test_a_linter_has_nothing_to_say(document: Path) -> None:
    told = await run(SPECTRAL, "lint", "--fail-severity", "hint", "--ruleset", RULES, document)
    assert told == (0, "No results with a severity of 'hint' or higher found!\n")


@shared
async def test_a_generated_client(
    service: Service, document: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its users have it: they send, are refused, look, and act."""
    package = document.with_name("generated_client")
    hooks = document.with_name("hooks.json")
    hooks.write_text('{"post_hooks": []}')  # nobody reads what is generated
    code, printed = await run(
        sys.executable, "-m", "openapi_python_client", "generate", "--path", document,
        "--output-path", package, "--meta", "none", "--config", hooks,
        NO_COLOR="1", HOME=str(document.parent),
    )  # fmt: skip
    assert code == 0, printed
    # which is for those who write the lines themselves
    told = [
        line for line in printed.splitlines() if line.startswith(("Unable", "Unsupp", "Cannot"))
    ]
    assert told == ["Unsupported content type application/x-ndjson"] * 2, printed
    monkeypatch.syspath_prepend(package.parent)
    client, models, events, status, admin, open_to_all = (
        importlib.import_module(f"{package.name}.{name}")
        for name in ("client", "models", "api.events", "api.status", "api.admin", "api.service")
    )

    async def ask(client: Any, api: Any, operation: str, **given: Any) -> tuple[int, Any]:
        module = importlib.import_module(f"{api.__name__}.{operation}")
        answer = await module.asyncio_detailed(client=client, **given)
        return int(answer.status_code), answer.parsed

    nobody = client.Client(service.url, raise_on_unexpected_status=True)
    sender, owner = (
        client.AuthenticatedClient(service.url, key, raise_on_unexpected_status=True)
        for key in ("in", "admin")
    )
    async with nobody, sender, owner:

        async def post(body: Any, **headers: str) -> tuple[int, int]:
            code, answer = await ask(sender, events, "post_events_v1", body=body, **headers)
            return code, answer.status_code

        await ask(owner, admin, "load_now")
        before = (await ask(owner, status, "get_status"))[1].lanes["install"].accepted
        install = models.Install("install", user_id=7, timestamp=1000)
        tea = models.Purchase("purchase", user_id=7, timestamp=1000, sku="tea")
        coffee = models.Purchase("purchase", user_id=7, timestamp=1000, sku="coffee")
        assert await post(install) == (200, 0)
        assert await post([install, tea, coffee], idempotency_key="k") == (200, 0)
        assert await post(install, idempotency_key="k") == (422, 10)
        assert await post(models.Install("install", user_id="x", timestamp=0)) == (400, 5)
        code, answer = await ask(
            sender, events, "post_events", body=[install, models.Install("install", 1, None)]
        )
        assert (code, answer.accepted, answer.errors[0].index) == (207, 1, 1)
        code, answer = await ask(nobody, events, "post_events", body=install)
        assert (code, answer.status_code) == (401, 8)
        assert await post([install] * 1500) == (503, 9)
        assert await post(install, prefer="wait=0") == (202, 0)

        assert (await ask(nobody, open_to_all, "get_readiness"))[0] == 200
        assert (await ask(nobody, status, "get_status"))[0] == 401
        code, seen = await ask(owner, status, "get_status")
        assert (code, seen.books.balanced) == (200, True)
        assert seen.lanes["install"].accepted == before + 4
        assert undescribed(seen) == []

        code, answer = await ask(owner, admin, "load_now")
        assert (code, answer.loaded.to_dict()) == (200, {"install": 4, "purchase": 1})
        code, dead = await ask(owner, admin, "list_dead_letters", lane="purchase")
        assert (code, dead.total, dead.groups[0].sqlstate) == (200, 1, "22001")
        assert dead.letters[0].event.to_dict()["sku"] == "coffee"
        which = models.DeadLetterSelectionType0([dead.letters[0].id])
        code, answer = await ask(owner, admin, "drop_dead_letters", body=which)
        assert (code, answer.dropped) == (200, 1)
        code, refused = await ask(owner, admin, "list_refused")
        assert {each.reason.value for each in refused.refused} >= {"bad_value", "unauthorized"}
