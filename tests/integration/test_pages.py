"""Status, stream, access and description over HTTP, without a browser."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import sys
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec
import pytest

from datapipe.cli.terminal import progress
from datapipe.events.registry import load_registry
from datapipe.http import openapi
from datapipe.settings import Settings
from tests.service import ROOT, Service

CRASH = {"event_name": "crash_report", "user_id": 1, "timestamp": 2, "message": "boom"}
MakeService = Callable[..., Service]


async def event(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The next server-sent event."""
    async for line in response.content:
        if line.startswith(b"data: "):
            told: dict[str, Any] = json.loads(line[6:])
            return told
    raise EOFError


async def test_stream_sends_all_first_and_then_each_second(
    database: str, make_service: MakeService
) -> None:
    service = await make_service(database_url=database, load_interval=300).start()
    await service.post([CRASH] * 3)
    whole = await service.status()
    async with service.session.get(f"{service.url}/stream") as response:
        assert response.content_type == "text/event-stream"
        first = await event(response)
        assert first.keys() == whole.keys()
        assert first["books"]["accepted"] == 3
        began = asyncio.get_running_loop().time()
        later = [await event(response) for _ in range(3)]
        assert 1.5 < asyncio.get_running_loop().time() - began < 4.5
        assert all(each.keys() >= whole.keys() - {"history"} for each in later)
        assert sum("history" in each for each in later) <= 1


async def test_streams_end_at_once_when_the_service_stops(
    database: str, make_service: MakeService
) -> None:
    """The best of some: this machine may be busy with other things."""
    loop = asyncio.get_running_loop()
    tries = []
    for _ in range(3):
        service = await make_service(database_url=database).start()
        async with service.session.get(f"{service.url}/stream") as response:
            await event(response)
            began = loop.time()
            stopping = asyncio.create_task(service.stop())
            async for _ in response.content:
                pass
            tries.append(loop.time() - began)
        assert await stopping == 0
        if tries[-1] < 0.9:  # before the next event is due
            return
    raise AssertionError(tries)


async def test_refused_requests_are_shown_to_admins(
    database: str, make_service: MakeService
) -> None:
    service = await make_service(database_url=database).start()
    traced = {"X-Request-ID": "first", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    await service.post(b"x" * 5000, headers=traced)
    batch = [CRASH, {"event_name": "install", "user_id": "x"}, {"event_name": "nonesuch"}]
    async with service.session.post(f"{service.url}/", data=json.dumps(batch)) as response:
        request_id = response.headers["X-Request-ID"]
    for _ in range(3):
        await service.post("")
    refused = (await service.get("/refused"))[1]["refused"]
    assert [each["reason"] for each in refused[:3]] == ["no_content"] * 3
    assert refused[3]["request_id"] == request_id
    assert refused[3]["events"] == 2
    assert json.loads(refused[3]["body"]) == batch[1]
    assert refused[4]["request_id"] == "first"
    assert (refused[4]["trace_id"], refused[4]["span_id"]) == ("a" * 32, "b" * 16)
    assert len(refused[4]["body"]) == 301
    async with service.session.get(f"{service.url}/") as response:
        assert re.findall(r"trace <[^>]+>(\w+)<", await response.text()) == ["a" * 32]
    assert "xxx" not in json.dumps(await service.status())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://evil.test"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.test"}, 403),  # DNS rebinding
        ({"Host": "127.0.0.1.evil.test"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
    ],
)
async def test_who_may_act(
    database: str, make_service: MakeService, headers: dict[str, str], status: int
) -> None:
    service = await make_service(database_url=database).start()
    async with service.session.post(f"{service.url}/load", headers=headers) as response:
        assert response.status == status
    async with service.session.get(f"{service.url}/refused", headers=headers) as response:
        assert response.status == status
    async with service.session.get(f"{service.url}/", headers=headers) as response:
        assert response.status == 200
        shows_button = "Load now</button>" in await response.text()
        assert shows_button == ("evil" not in headers.get("Host", ""))
        assert "unsafe" not in response.headers["Content-Security-Policy"]


async def test_with_an_admin_key(database: str, make_service: MakeService) -> None:
    service = await make_service(database_url=database, admin_key="a-key").start()
    for path in ("/", "/status.json", "/stream", "/metrics", "/refused"):
        for headers in ({}, {"Authorization": "Bearer a-ke"}, {"Authorization": "Basic !"}):
            async with service.session.get(f"{service.url}{path}", headers=headers) as response:
                assert response.status == 401, path
                assert "WWW-Authenticate" in response.headers
    key = {"Authorization": f"Basic {b64encode(b'anyone:a-key').decode()}"}
    async with service.session.get(f"{service.url}/refused", headers=key) as response:
        assert response.status == 200
    foreign = {**key, "Origin": "http://evil.test"}
    async with service.session.post(f"{service.url}/load", headers=foreign) as response:
        assert response.status == 403
    for path in ("/healthz", "/readyz", "/openapi.json", "/style.css"):
        async with service.session.get(f"{service.url}{path}") as response:
            assert response.status == 200, path


async def test_examples_are_accepted(database: str, make_service: MakeService) -> None:
    events = {"all": {"a": "float", "b": "bool", "c": "datetime", "d": "date", "e": "Decimal",
                      "f": "UUID", "g": "dict", "h": "list?"}}  # fmt: skip
    service = await make_service(database_url=database, events=events).start()
    document = (await service.get("/openapi.json"))[1]
    kinds = load_registry(Settings(events=events)).types
    assert document == json.loads(msgspec.json.encode(
        openapi.document(load_registry(Settings(events=events)))
    ))  # fmt: skip
    for name in kinds:
        (example,) = document["components"]["schemas"][name]["examples"]
        assert await service.post(example) == (200, {"status_code": 0, "status_message": "ok"})


async def test_no_answer_is_outside_the_description(
    database: str, make_service: MakeService
) -> None:
    """Schemathesis sends what the description allows, and much that it does not.

    Not asked: that all which fits the description is accepted. To JSON Schema 1.0 is an integer.
    """
    service = await make_service(database_url=database).start()
    checks = [
        "not_a_server_error", "status_code_conformance", "content_type_conformance",
        "response_headers_conformance", "response_schema_conformance", "unsupported_method",
        "allow_header_conformance", "missing_required_header",
    ]  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/openapi.json",
        "--exclude-path", "/stream", "--checks", ",".join(checks), "--max-examples", "100",
        "--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--no-color",
        "--max-time", "20", "--suppress-health-check", "all",
        cwd=service.file.parent,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "HOME": "/nonexistent",
             "SCHEMATHESIS_HOOKS": "tests.integration.schemathesis_hooks"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    told, _ = await process.communicate()
    assert process.returncode == 0, told.decode()[-6000:]
    assert not service.logged("fault")


async def test_status_in_the_terminal(database: str, make_service: MakeService) -> None:
    service = await make_service(database_url=database, admin_key="a-key", load_interval=300)\
        .start()  # fmt: skip
    await service.post([CRASH] * 1204)

    async def status(
        url: str, out: int = asyncio.subprocess.PIPE, **env: str
    ) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "datapipe", "status", url, cwd=service.file.parent,
            env={"PYTHONPATH": str(ROOT), **env}, stdout=out, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        told, _ = await process.communicate()
        return process.returncode, (told or b"").decode()

    code, told = await status(service.url, DATAPIPE_ADMIN_KEY="a-key")
    assert code == 0
    lines = told.splitlines()
    assert lines[0].startswith("Healthy. 1,204 events waiting")
    head, *types = lines[1:6]
    assert head.split()[:4] == ["type", "accepted", "recovered", "loaded"]
    crash, *_, everything = types
    assert crash.split()[:4] == ["crash_report", "1,204", "0", "0"]
    assert crash.index("1,204") + len("1,204") == head.index("accepted") + len("accepted")
    assert everything.startswith("all types ")
    assert everything.endswith("  accounted for")
    assert "\x1b" not in told
    reader, terminal = pty.openpty()
    code, _ = await status(service.url, terminal, DATAPIPE_ADMIN_KEY="a-key")
    coloured = os.read(reader, 65_536).decode()
    assert coloured.startswith("\x1b[32mHealthy. 1,204 events waiting")
    assert "\r\n\x1b[1mtype  " in coloured
    for end in (reader, terminal):
        os.close(end)
    code, told = await status(service.url)
    assert (code, len(told.splitlines())) == (1, 1)
    assert "DATAPIPE_ADMIN_KEY" in told
    for nowhere in ("http://127.0.0.1:1", "nonsense"):
        code, told = await status(nowhere)
        assert (code, len(told.splitlines())) == (1, 1)


async def test_progress_takes_one_line_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        async with progress("loading events", lambda: 1204):
            told = await asyncio.to_thread(os.read, reader, 100)
        assert told == b"\r\x1b[Kloading events: 1,204 left"
        rest = os.read(reader, 65_536)
    assert rest.endswith(b"\r\x1b[K")
    assert b"\n" not in rest
    os.close(reader)
