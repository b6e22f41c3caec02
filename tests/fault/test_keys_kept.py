"""How long idempotency keys are known: `dedupe_window`, and as long as what they concern waits."""

from __future__ import annotations

from collections.abc import Callable

from tests.postgres import Postgres
from tests.service import Service, until
from tests.wire import crash

MakeService = Callable[..., Service]
MODULE = "tests.fault.modules.quick_keys"
WINDOW_S = 4
NEVER = {"load_interval": 3600, "load_min_interval": 3600}  # loads are asked for


async def post(service: Service) -> None:
    """One keyed POST, always the same."""
    status, _ = await service.post(crash("once", 1), headers={"Idempotency-Key": "k"})
    assert status == 200


def keys(database: str) -> int:
    ledger = "SELECT count(*) FROM datapipe_ledger WHERE kind IN ('claim', 'part')"
    return int(Postgres.execute(database, ledger)[0][0])


async def old(database: str, seconds: float) -> None:
    """Wait until the keys that are there are that old."""
    sql = f"SELECT count(*) FROM datapipe_ledger WHERE now() - loaded_at < interval '{seconds} s'"

    async def holds() -> bool:
        return bool(Postgres.execute(database, sql)[0][0] == 0)

    await until(holds, what="old keys")


async def beats(database: str) -> None:
    """Wait for some heartbeats."""
    sql = "SELECT max(beats) FROM datapipe_processes"
    before = Postgres.execute(database, sql)[0][0] or 0

    async def beaten() -> bool:
        return bool((Postgres.execute(database, sql)[0][0] or 0) >= before + 4)

    await until(beaten, what="some heartbeats")


async def counted_once(service: Service, database: str) -> None:
    books = await service.drained()
    assert (books["duplicate"], books["dead"], books["balanced"]) == (1, 0, True), books
    assert Postgres.execute(database, "SELECT count(*) FROM crash_report") == [(1,)]


async def test_a_key_is_known_for_its_window(make_service: MakeService, database: str) -> None:
    service = await make_service(
        database_url=database, dedupe_window=600, event_modules=[MODULE], **NEVER
    ).start()
    await post(service)
    await service.load()
    await old(database, 1)
    await beats(database)
    await post(service)
    await service.load()
    await counted_once(service, database)


async def test_a_key_is_known_while_its_event_waits(
    make_service: MakeService, database: str
) -> None:
    """Sent again within the window and loaded long after it: counted once all the same."""
    service = await make_service(
        database_url=database, dedupe_window=WINDOW_S, event_modules=[MODULE], **NEVER
    ).start()
    await post(service)
    await service.load()
    await post(service)
    await old(database, WINDOW_S)
    await beats(database)
    await service.load()
    await counted_once(service, database)

    async def gone() -> bool:
        return keys(database) == 0

    await until(gone, what="an end of keys that nothing waits for")


async def test_a_key_is_known_while_its_event_waits_in_a_journal_that_nobody_has_read(
    make_service: MakeService, database: str
) -> None:
    """A process that starts tells nobody what waits before it has looked for itself."""
    service = await make_service(
        database_url=database, dedupe_window=WINDOW_S, event_modules=[MODULE], **NEVER
    ).start()
    await post(service)
    await service.load()
    await post(service)
    await beats(database)
    await service.kill()
    await old(database, WINDOW_S)
    service.settings["event_modules"] = [MODULE, "tests.fault.modules.slow_look"]
    await service.start()

    async def recovered() -> bool:
        return bool((await service.status())["books"]["recovered"])

    await until(recovered, what="the first look")
    await counted_once(service, database)


async def test_rows_of_the_ledger_are_written_in_key_order(
    make_service: MakeService, database: str
) -> None:
    """Two processes that write the same ones then wait for each other, and never both."""
    service = await make_service(database_url=database, **NEVER).start()
    for n in range(12):
        status, _ = await service.post(crash("m", n), headers={"Idempotency-Key": f"key{n}"})
        assert status == 200
    await service.load()
    for kind in ("claim", "part"):
        sql = f"SELECT segment FROM datapipe_ledger WHERE kind = '{kind}' ORDER BY ctid"
        written = [name for (name,) in Postgres.execute(database, sql)]
        assert len(written) == 12
        assert written == sorted(written)
