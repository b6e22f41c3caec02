"""CORS: off by default, for listed origins only, and for POSTs of events only."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.service import Service
from tests.wire import WAYS, Answer, ask, crash, post, running, wire

shared = pytest.mark.asyncio(loop_scope="module")

SHOP = "https://shop.example"
BODY = json.dumps(crash()).encode()
HEADERS = (
    "Content-Type, Content-Encoding, Idempotency-Key, Prefer, Authorization, X-Request-ID, "
    "traceparent, tracestate"
)
EXPOSED = "Preference-Applied, Retry-After, X-Request-ID"


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=WAYS)
async def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Service]:
    async with running(
        tmp_path_factory.mktemp("cors"), mirror="none", database_url="postgresql://127.0.0.1:1/x",
        cors_origins=[SHOP, "http://localhost:3000"], ingest_keys=["k"], admin_key="a",
        **WAYS[request.param],
    ) as service:  # fmt: skip
        yield service
        assert not service.logged("fault")


def allowed(answer: Answer) -> dict[str, str]:
    """The headers of an answer that are about CORS."""
    return {k: v for k, v in answer.headers.items() if k.startswith("access-control-")}


def preflight(origin: str, path: str = "/", method: str = "POST") -> bytes:
    lines = [f"OPTIONS {path} HTTP/1.1", "Host: localhost", f"Origin: {origin}",
             f"Access-Control-Request-Method: {method}",
             "Access-Control-Request-Headers: content-type,idempotency-key"]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode()


@shared
@pytest.mark.parametrize("path", ["/", "/v1/events"])
@pytest.mark.parametrize("origin", [SHOP, "http://localhost:3000"])
async def test_a_listed_origin_may_ask_and_post(service: Service, origin: str, path: str) -> None:
    answer = await ask(service, preflight(origin, path), method="OPTIONS")
    assert (answer.status, answer.headers["vary"]) == (204, "Origin")
    assert allowed(answer) == {
        "access-control-allow-origin": origin,
        "access-control-allow-methods": "POST",
        "access-control-allow-headers": HEADERS,
        "access-control-expose-headers": EXPOSED,
        "access-control-max-age": "600",
    }
    posted = await ask(service, post(BODY, f"Origin: {origin}", target=f"{path}?key=k"))
    assert (posted.status, posted.code, posted.headers["vary"]) == (200, 0, "Origin")
    assert allowed(posted) == {
        "access-control-allow-origin": origin,
        "access-control-expose-headers": EXPOSED,
    }


@shared
@pytest.mark.parametrize(
    "origin",
    ["https://shop.example.evil", "http://shop.example", "https://shop.example:8443", "null",
     "https://SHOP.example", f"{SHOP}, {SHOP}", "*"],
)  # fmt: skip
async def test_no_other_origin_is_named(service: Service, origin: str) -> None:
    answer = await ask(service, preflight(origin), method="OPTIONS")
    assert (answer.status, answer.code, allowed(answer)) == (403, 403, {})
    assert "cors_origins" in answer.json["status_message"]
    posted = await ask(service, post(BODY, f"Origin: {origin}", target="/?key=k"))
    # no more than a form of that page could do: whoever must not post is kept out by a key
    assert (posted.status, posted.headers["vary"], allowed(posted)) == (200, "Origin", {})


@shared
@pytest.mark.parametrize(
    ("request_", "status"),
    [(post(b"{", f"Origin: {SHOP}", target="/?key=k"), 400),
     (post(BODY, f"Origin: {SHOP}"), 401),
     (post(BODY, f"Origin: {SHOP}", "Content-Encoding: br", target="/?key=k"), 415)],
)  # fmt: skip
async def test_a_script_may_read_why_it_was_refused(
    service: Service, request_: bytes, status: int
) -> None:
    answer = await ask(service, request_)
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (status, SHOP)


@shared
async def test_the_page_and_what_an_admin_may_do_stay_closed(service: Service) -> None:
    for path in ("/load", "/dead", "/status.json", "/metrics", "/stream", "/nowhere"):
        answer = await ask(service, preflight(SHOP, path), method="OPTIONS")
        assert answer.status in (404, 405), path
        assert "vary" not in answer.headers
        assert not allowed(answer), path
    key = "Authorization: Bearer a"
    for method, path in (
        ("GET", "/"), ("GET", "/status.json"), ("GET", "/dead"), ("POST", "/load"), ("GET", "/x"),
    ):  # fmt: skip
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{key}\r\nOrigin: {SHOP}\r\n\r\n"
        answer = await ask(service, head.encode(), method=method)
        assert not allowed(answer), path


@shared
async def test_one_connection_with_and_without_an_origin(service: Service) -> None:
    async with wire(service) as line:
        for origin in (None, SHOP, None, SHOP):
            headers = ["Authorization: Bearer k", *([f"Origin: {origin}"] if origin else [])]
            await line.send(post(BODY, *headers))
            answer = await line.answer()
            assert answer.status == 200
            assert answer.headers.get("access-control-allow-origin") == origin


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("origins", "named"), [([], None), (["*"], "*"), ([SHOP, "*"], "*")])
async def test_off_by_default_and_open_to_all_only_if_told(
    tmp_path: Path, origins: list[str], named: str | None, way: str
) -> None:
    settings: dict[str, Any] = {"cors_origins": origins} if origins else {}
    settings |= {"mirror": "none", "database_url": "postgresql://127.0.0.1:1/x", **WAYS[way]}
    async with running(tmp_path, **settings) as service:
        answer = await ask(service, preflight(SHOP), method="OPTIONS")
        assert answer.status == (204 if named else 405)
        put = await ask(service, b"PUT / HTTP/1.1\r\nHost: localhost\r\n\r\n", method="PUT")
        assert ("OPTIONS" in put.headers["allow"]) == bool(origins)
        assert {"GET", "POST"} <= set(put.headers["allow"].split(","))
        posted = await ask(service, post(BODY, f"Origin: {SHOP}"))
        for each in (answer, posted):
            assert each.headers.get("access-control-allow-origin") == named
            assert "access-control-allow-credentials" not in each.headers
            assert named or not allowed(each)


@pytest.mark.parametrize("way", WAYS)
async def test_a_503_says_when_to_try_again(tmp_path: Path, way: str) -> None:
    async with running(
        tmp_path, mirror="none", buffer_max_bytes=0, cors_origins=[SHOP],
        database_url="postgresql://127.0.0.1:1/x", **WAYS[way],
    ) as service:  # fmt: skip
        answer = await ask(service, post(BODY, f"Origin: {SHOP}"))
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (503, SHOP)
        assert "Retry-After" in answer.headers["access-control-expose-headers"]
        assert int(answer.headers["retry-after"]) >= 1
