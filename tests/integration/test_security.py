"""What docs/security.md claims and no other test shows."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from datapipe.errors import Refused
from datapipe.http.auth import Access, Credentials
from datapipe.http.ingest_keys import IngestKeys
from datapipe.pipeline.records import Records
from datapipe.settings import Settings
from tests.postgres import Postgres
from tests.service import Service
from tests.wire import ask, crash

SQL = "'); DROP TABLE crash_report; --"


async def test_no_path_leads_to_a_file(
    make_service: Callable[..., Service], database: str, tmp_path: Path
) -> None:
    (tmp_path / "var").mkdir(exist_ok=True)
    (tmp_path / "var" / "secret.txt").write_text("Secret")
    service = await make_service(database_url=database).start()
    for path in (
        "/../../etc/passwd", "/..%2f..%2fetc/passwd", "//etc/passwd", "/static/../secret.txt",
        "/%2e%2e/var/secret.txt", "/./var/secret.txt", "/\\..\\secret.txt", "/assets/..%00/x",
        "/openapi.json/../../setup.cfg", "/healthz/", "/HEALTHZ", "/%68ealthz%00",
    ):  # fmt: skip
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        answer = await ask(service, request, method="GET")
        assert answer.status in (400, 404), (path, answer)
        assert b"Secret" not in answer.body
        assert b"root:" not in answer.body


async def test_sql_in_values_is_text(
    make_service: Callable[..., Service], database: str, postgres: Postgres
) -> None:
    service = await make_service(database_url=database).start()
    assert (await service.post(crash(SQL), headers={"Idempotency-Key": "';--"}))[0] == 200
    await service.drained()
    postgres.execute(database, "ALTER TABLE crash_report ADD CHECK (user_id <> 13)")
    assert (await service.post(crash(SQL, 13)))[0] == 200
    await service.drained()
    for query in (f"?lane={SQL}", f"?sqlstate={SQL}"):
        assert (await service.get(f"/dead{query}"))[1].get("total", 0) == 0
    assert postgres.execute(database, "SELECT message FROM crash_report") == [(SQL,)]
    dead = postgres.execute(database, "SELECT event->>'message' FROM datapipe_dead_letters")
    assert dead == [(SQL,)]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bytes]]:
    """All that is compared in constant time; nothing else may decide."""
    seen: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(given: bytes, key: bytes) -> bool:
        seen.append((given, key))
        return real(given, key)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    return seen


@pytest.mark.parametrize("given", ["one", "two", "three", "on", "", "x" * 100])
async def test_keys_are_compared_in_constant_time(
    compared: list[tuple[bytes, bytes]], given: str
) -> None:
    """Every key, whichever fits, and also when none is given."""
    settings = Settings(ingest_keys=["one", "two"], admin_key="one", mirror="none")
    keys = IngestKeys(settings.ingest_keys, Records(), ())
    headers: Any = CIMultiDict({"Authorization": f"Bearer {given}"})
    try:
        keys.grant(Credentials(headers["Authorization"]))
        accepted = True
    except Refused:
        accepted = False
    assert accepted == (given in ("one", "two"))
    assert compared == [(given.encode(), b"one"), (given.encode(), b"two")]
    compared.clear()
    request = make_mocked_request("POST", "/load", headers=headers)
    try:
        Access(settings).may_act(request)
        accepted = True
    except Refused:
        accepted = False
    assert accepted == (given == "one")
    assert compared
    assert set(compared) == {(given.encode(), b"one")}
