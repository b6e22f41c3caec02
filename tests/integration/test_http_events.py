"""Event types, contract section 5: from the class, or the setting, to the rows of its table."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import pytest_asyncio

from tests.postgres import Postgres
from tests.service import ROOT, Service, until
from tests.wire import crash, purchase, running

shared = pytest.mark.asyncio(loop_scope="module")

MODULE = '''
from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import ClassVar, Optional
from uuid import UUID

from datapipe import Event, register


@register("required")
class Required(Event):
    n: int
    a_int: int
    a_float: float
    a_str: str
    a_bool: bool
    a_datetime: datetime
    a_date: date
    a_decimal: Decimal
    a_uuid: UUID
    a_dict: dict
    a_list: list


@register("optional")
class Optional_(Event):
    """With a default of each kind, and what is no field."""

    KNOWN: ClassVar[int] = 1

    n: int
    a_int: int = -7
    a_float: float = 0.25
    a_str: str = "it's \\\\N \\t %s"
    a_bool: bool = True
    a_datetime: datetime = datetime(2026, 1, 2, 3, 4, 5)
    a_date: date = date(2026, 1, 2)
    a_decimal: Decimal = Decimal("1.50")
    a_uuid: UUID = UUID("7f8e7a52-32f3-4f9f-9a53-1f1f1f1f1f1f")
    a_dict: dict = {"a": [1, None]}
    a_list: list = []
    a_null: Optional[int] = None
    a_set: str | None = "set"


@register("nullable")
class Nullable(Event):
    n: int
    a_int: int | None
    a_dict: dict | None
    order: str | None = None
    select: int | None = None
'''
DECLARED = {
    "signup": {"user_id": "int", "trial": "bool = false", "seen_at": "datetime?"},
    "a": {"n": "int"},
    "x" * 48: {"n": "int", "y" * 63: "str"},
    "every_kind": {
        "n": "int", "a_str": 'str = "it\'s"', "a_dict": 'dict = {"a": 1}', "a_list": "list = [1]",
        "a_date": 'date = "2026-01-02"', "a_decimal": "Decimal = 1.5", "a_float": "float = 1",
        "a_null": "UUID?", "a_either": "int? = 5",
    },
    "bare": {},
}  # fmt: skip
NAMES = {"crash_report", "purchase", "install", "required", "optional", "nullable", *DECLARED}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(
    tmp_path_factory: pytest.TempPathFactory, database_url: str
) -> AsyncIterator[Service]:
    """With people's own types, of a module and of the settings."""
    folder = tmp_path_factory.mktemp("events")
    (folder / "their_package").mkdir()
    (folder / "their_package" / "types.py").write_text(MODULE)
    async with running(
        folder, {"PYTHONPATH": f"{ROOT}:{folder}"}, database_url=database_url,
        event_modules=["their_package.types"], events=DECLARED,
    ) as service:  # fmt: skip
        yield service
        assert not service.logged("fault"), service.logged("fault")[0]["exception"]


@pytest.fixture
def store(service: Service, database_url: str) -> Callable[..., Any]:
    """Posts one event, loads it, and gives its row."""

    async def row(name: str, **values: object) -> dict[str, Any]:
        n = uuid4().int >> 66
        body = json.dumps({"event_name": name, "n": n, **values})
        status, answer = await service.post(body)
        assert status == 200, answer
        assert (await service.load()) == {"loaded": {name: 1}, "failed": {}}
        (found,) = Postgres.execute(
            database_url, f"SELECT to_jsonb(t) FROM {name} AS t WHERE n = %s", n
        )
        return {key: value for key, value in found[0].items() if key != "n"}

    return row


def columns(url: str, table: str) -> dict[str, str]:
    sql = (
        "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute"
        " WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
    )
    return dict(Postgres.execute(url, sql, table))


# --- values ---

FULL: dict[str, Any] = {
    "a_int": 1, "a_float": 1.5, "a_str": "s", "a_bool": True, "a_datetime": "2026-11-22T12:00:00Z",
    "a_date": "2026-11-22", "a_decimal": "1.5", "a_uuid": str(UUID(int=7)), "a_dict": {},
    "a_list": [],
}  # fmt: skip
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
TAKEN: list[tuple[str, object, object]] = [
    ("a_int", 0, 0), ("a_int", -(2**63), -(2**63)), ("a_int", 2**63 - 1, 2**63 - 1),
    ("a_float", 0.1, 0.1), ("a_float", 3, 3.0), ("a_float", -1e-300, -1e-300),
    ("a_float", 1.7976931348623157e308, 1.7976931348623157e308), ("a_float", 5e-324, 5e-324),
    ("a_float", 2**53 + 1, float(2**53 + 1)), ("a_str", "", ""), ("a_str", "\u20ac", "\u20ac"),
    ("a_bool", False, False), ("a_bool", True, True),
    ("a_datetime", "2026-11-22T12:00:00Z", NOON), ("a_datetime", "2026-11-22T12:00:00", NOON),
    ("a_datetime", "2026-11-22T12:00:00+00:00", NOON), ("a_datetime", "2026-11-22 12:00:00", NOON),
    ("a_datetime", "2026-11-22T07:30:00-04:30", NOON), ("a_datetime", "2026-11-22t12:00:00z", NOON),
    ("a_datetime", "2026-11-22T12:00:00.123456Z", NOON.replace(microsecond=123456)),
    ("a_datetime", "2026-11-23T11:59:00+23:59", NOON),
    ("a_datetime", "0001-01-01T00:00:00", datetime(1, 1, 1, tzinfo=UTC)),
    ("a_datetime", "9999-12-31T23:59:59.999999Z",
     datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)),
    ("a_date", "0001-01-01", date(1, 1, 1)), ("a_date", "9999-12-31", date(9999, 12, 31)),
    ("a_date", "2024-02-29", date(2024, 2, 29)),
    ("a_decimal", "19.990", Decimal("19.990")), ("a_decimal", 19.99, Decimal("19.99")),
    ("a_decimal", 7, Decimal(7)), ("a_decimal", "-1e-20", Decimal("-1e-20")),
    ("a_decimal", "9" * 100, Decimal("9" * 100)), ("a_decimal", 10**40, Decimal(10**40)),
    ("a_uuid", "7F8E7A52-32F3-4F9F-9A53-1F1F1F1F1F1F",
     UUID("7f8e7a52-32f3-4f9f-9a53-1f1f1f1f1f1f")),
    ("a_uuid", "00000000-0000-0000-0000-000000000000", UUID(int=0)),
    ("a_dict", {}, {}), ("a_dict", {"a": {"b": [1, None, True, "x", 1.5]}},
     {"a": {"b": [1, None, True, "x", 1.5]}}),
    ("a_list", [], []), ("a_list", [[[]], {}, None], [[[]], {}, None]),
]  # fmt: skip


@shared
async def test_values_of_every_kind(service: Service, database_url: str) -> None:
    start = uuid4().int >> 66
    events = [
        {"event_name": "required", "n": start + i, **FULL, column: value}
        for i, (column, value, _) in enumerate(TAKEN)
    ]
    for i, event in enumerate(events):  # one by one tells which
        status, answer = await service.post(event)
        assert (status, answer["status_code"]) == (200, 0), (TAKEN[i], answer)
    await service.post([{**event, "n": event["n"] + 1000} for event in events])
    assert (await service.load())["failed"] == {}
    for offset in (0, 1000):
        for i, (column, _, stored) in enumerate(TAKEN):
            sql = f"SET timezone = 'UTC'; SELECT {column} FROM required WHERE n = %s"
            ((value,),) = Postgres.execute(database_url, sql, start + offset + i)
            if column == "a_uuid":
                value = UUID(value)
            assert value == stored, (column, value)
            assert type(value) is type(stored), (column, value)
            assert str(value) == str(stored)


NOT_TAKEN = [
    ("a_float", "1.5"), ("a_float", True), ("a_float", None), ("a_float", 10**400),
    ("a_bool", 1), ("a_bool", "true"), ("a_bool", None), ("a_str", ["s"]),
    ("a_datetime", 1000), ("a_datetime", "yesterday"), ("a_datetime", "2026-11"),
    ("a_datetime", "2026-02-30T00:00:00Z"), ("a_datetime", ""), ("a_datetime", "infinity"),
    ("a_date", "2026-02-29"), ("a_date", "22.11.2026"), ("a_date", 0), ("a_date", "today"),
    ("a_date", "2026-11-22T12:00:00Z"), ("a_decimal", "abc"), ("a_decimal", ""),
    ("a_decimal", "NaN"), ("a_decimal", "Infinity"), ("a_decimal", "1e200000"),
    ("a_decimal", "1e-20000"), ("a_decimal", True), ("a_uuid", "nope"), ("a_uuid", 7),
    ("a_uuid", ""), ("a_dict", []), ("a_dict", "{}"), ("a_dict", None), ("a_dict", 1),
    ("a_list", {}), ("a_list", "[]"), ("a_list", None),
]  # fmt: skip
SHOWN = {"a_decimal": "Decimal", "a_uuid": "UUID"}


@shared
@pytest.mark.parametrize(("column", "value"), NOT_TAKEN, ids=str)
async def test_values_out_of_type_or_range(service: Service, column: str, value: object) -> None:
    event = {"event_name": "required", "n": 1, **FULL, column: value}
    status, answer = await service.post(event)
    assert (status, answer["status_code"]) == (400, 5), answer
    assert column in answer["status_message"]
    assert SHOWN.get(column, column.removeprefix("a_")) in answer["status_message"]


@shared
@pytest.mark.parametrize("column", FULL)
async def test_a_key_without_a_default_must_be_there(service: Service, column: str) -> None:
    event = {"event_name": "required", "n": 1, **FULL}
    del event[column]
    status, answer = await service.post(event)
    assert (status, answer["status_code"]) == (400, 4)
    assert column in answer["status_message"]


# --- optional, nullable, ignored ---

DEFAULTS = {
    "a_int": -7, "a_float": 0.25, "a_str": "it's \\N \t %s", "a_bool": True,
    "a_datetime": "2026-01-02T03:04:05+00:00", "a_date": "2026-01-02", "a_decimal": 1.5,
    "a_uuid": "7f8e7a52-32f3-4f9f-9a53-1f1f1f1f1f1f", "a_dict": {"a": [1, None]}, "a_list": [],
    "a_null": None, "a_set": "set",
}  # fmt: skip


def in_utc(row: dict[str, Any]) -> dict[str, Any]:
    row.pop("received_at")
    if row.get("a_datetime"):
        row["a_datetime"] = datetime.fromisoformat(row["a_datetime"]).astimezone(UTC).isoformat()
    return row


@shared
async def test_defaults(service: Service, store: Any, database_url: str) -> None:
    assert in_utc(await store("optional")) == DEFAULTS
    given = {**FULL, "a_null": 1, "a_set": None, "a_decimal": 2}
    row = in_utc(await store("optional", **given))
    assert row == given | {"a_datetime": NOON.isoformat()}
    # they are the columns' defaults, for whoever else writes there
    sql = "SET timezone = 'America/Caracas'; INSERT INTO optional (n) VALUES (-1) RETURNING *"
    Postgres.execute(database_url, sql)
    ((row,),) = Postgres.execute(
        database_url, "SET timezone = 'UTC'; SELECT to_jsonb(o) - 'n' FROM optional o WHERE n = -1"
    )
    assert in_utc(row) == DEFAULTS


@shared
async def test_defaults_of_declared_types(store: Any) -> None:
    row = await store("every_kind")
    del row["received_at"]
    assert row == {
        "a_str": "it's", "a_dict": {"a": 1}, "a_list": [1], "a_date": "2026-01-02",
        "a_decimal": 1.5, "a_float": 1, "a_null": None, "a_either": 5,
    }  # fmt: skip
    assert (await store("every_kind", a_either=None))["a_either"] is None


@shared
async def test_nullable(service: Service, store: Any) -> None:
    row = await store("nullable", a_int=None, a_dict=None)
    del row["received_at"]
    assert row == {"a_int": None, "a_dict": None, "order": None, "select": None}
    row = await store("nullable", a_int=1, a_dict={"a": None}, order="by", select=1)
    assert (row["a_int"], row["a_dict"], row["order"], row["select"]) == (1, {"a": None}, "by", 1)
    status, answer = await service.post({"event_name": "nullable", "n": 1, "a_int": None})
    assert (status, answer["status_code"]) == (400, 4)  # null is a value: the key must be there
    assert "a_dict" in answer["status_message"]


@shared
async def test_what_is_not_declared_is_ignored(store: Any) -> None:
    more = {"received_at": "2001-01-01T00:00:00Z", "id": 5, "KNOWN": 5, "xmin": 1, "N": 9}
    row = await store("nullable", a_int=1, a_dict=None, nested={"a": [{}] * 9}, **more)
    assert set(row) == {"a_int", "a_dict", "order", "select", "received_at"}
    age = datetime.now(UTC) - datetime.fromisoformat(row["received_at"])
    assert abs(age.total_seconds()) < 60


# --- tables ---


@shared
async def test_tables(service: Service, database_url: str) -> None:
    types = {
        "n": "bigint", "a_int": "bigint", "a_float": "double precision", "a_str": "text",
        "a_bool": "boolean", "a_datetime": "timestamp with time zone", "a_date": "date",
        "a_decimal": "numeric", "a_uuid": "uuid", "a_dict": "jsonb", "a_list": "jsonb",
        "received_at": "timestamp with time zone",
    }  # fmt: skip
    await service.post({"event_name": "required", "n": 1, **FULL})
    await service.load()
    assert columns(database_url, "required") == types
    for name in ("a", "x" * 48, "bare", "signup"):
        event = {"event_name": name, "n": 1, "y" * 63: "long", "user_id": 1}
        assert (await service.post(event))[0] == 200
    loaded = (await service.load())["loaded"]
    assert loaded == dict.fromkeys(["a", "x" * 48, "bare", "signup"], 1)
    assert set(columns(database_url, "bare")) == {"received_at"}
    assert columns(database_url, "signup") == {
        "user_id": "bigint", "trial": "boolean", "seen_at": "timestamp with time zone",
        "received_at": "timestamp with time zone",
    }  # fmt: skip
    assert Postgres.execute(database_url, "SELECT user_id, trial, seen_at FROM signup") == [
        (1, False, None)
    ]


@shared
async def test_every_type_shows_everywhere(service: Service) -> None:
    await service.post(crash())
    assert set((await service.status())["lanes"]) == NAMES
    schemas = (await service.get("/openapi.json"))[1]["components"]["schemas"]
    assert set(schemas) >= NAMES
    async with service.session.get(f"{service.url}/metrics") as response:
        metrics = await response.text()
    async with service.session.get(f"{service.url}/") as response:
        page = await response.text()
    for name in NAMES:
        assert f'datapipe_events_accepted_total{{lane="{name}"}}' in metrics
        assert name in page


async def test_another_schema(make_service: Callable[..., Service], database: str) -> None:
    odd = 'We"ird schema'
    Postgres.execute(database, 'CREATE SCHEMA "We""ird schema"')
    service = await make_service(database_url=database, database_schema=odd).start()
    await service.post(crash("m", 5))
    await service.drained()
    sql = 'SELECT user_id FROM "We""ird schema".crash_report'
    assert Postgres.execute(database, sql) == [(5,)]
    assert Postgres.execute(database, "SELECT to_regclass('public.crash_report')") == [(None,)]
    assert (await service.status())["database"]["schema"] == odd


async def test_a_table_that_was_there_before(
    make_service: Callable[..., Service], database: str
) -> None:
    """A missing column is added; what is foreign, NOT NULL or of another type is left alone."""
    Postgres.execute(
        database,
        "CREATE TABLE crash_report (id serial PRIMARY KEY, message varchar(99) NOT NULL,"
        " theirs text DEFAULT 'kept', user_id numeric, received_at timestamptz);"
        "INSERT INTO crash_report (message, user_id) VALUES ('old', 1)",
    )
    service = await make_service(database_url=database).start()
    await service.post(crash("new", 2))
    await service.drained()
    assert columns(database, "crash_report") == {
        "id": "integer", "message": "character varying(99)", "theirs": "text",
        "user_id": "numeric", "timestamp": "bigint", "received_at": "timestamp with time zone",
    }  # fmt: skip
    sql = "SELECT id, message, theirs, user_id, timestamp FROM crash_report ORDER BY id"
    assert Postgres.execute(database, sql) == [
        (1, "old", "kept", 1, None), (2, "new", "kept", 2, 1000),
    ]  # fmt: skip
    sql = "SELECT attnotnull FROM pg_attribute WHERE attname IN ('message', 'user_id')"
    sql += " AND attrelid = 'crash_report'::regclass ORDER BY attname"
    assert Postgres.execute(database, sql) == [(True,), (False,)]


async def test_a_dropped_table_is_made_again(
    make_service: Callable[..., Service], database: str
) -> None:
    service = await make_service(database_url=database).start()
    for drop in ("DROP TABLE crash_report", "ALTER TABLE crash_report DROP COLUMN message"):
        await service.post(crash("before"))
        await service.drained()
        Postgres.execute(database, drop)
    await service.post(crash("after"))
    books = await service.drained()
    assert (books["loaded"], books["dead"], books["balanced"]) == (3, 0, True)
    assert ("after",) in Postgres.execute(database, "SELECT message FROM crash_report")


async def test_a_table_that_cannot_hold_its_events_blocks_its_own_lane(
    make_service: Callable[..., Service], database: str
) -> None:
    Postgres.execute(database, "CREATE VIEW crash_report AS SELECT 1 AS user_id")
    service = await make_service(database_url=database).start()
    await service.post([crash("kept", 1), purchase("on", 2)])

    async def blocked() -> bool:
        return (await service.status())["lanes"]["crash_report"]["blocked"] is not None

    await until(blocked, what="a blocked lane")
    await service.post([crash("kept", 3), purchase("on", 4)])

    async def others_go_on() -> bool:
        return bool((await service.status())["lanes"]["purchase"]["loaded"] == 2)

    await until(others_go_on)
    status = await service.status()
    lane = status["lanes"]["crash_report"]
    assert (lane["loaded"], lane["waiting"], lane["dead"]) == (0, 2, 0)
    assert lane["blocked"]
    assert status["ready"]
    assert status["summary"]["state"] != "healthy"
    assert status["books"]["balanced"]
    (line,) = {(line["lane"], line["error"]) for line in service.logged("lane blocked")}
    assert line == ("crash_report", lane["blocked"])
    failed = (await service.load("?lane=crash_report"))["failed"]
    assert failed["crash_report"].startswith("blocked: ")
    async with service.session.get(f"{service.url}/") as response:
        assert "crash_report" in await response.text()
    Postgres.execute(database, "DROP VIEW crash_report")
    await service.drained()
    status = await service.status()
    assert status["lanes"]["crash_report"]["blocked"] is None
    assert service.logged("lane healed")[0]["lane"] == "crash_report"
    rows = Postgres.execute(database, "SELECT user_id FROM crash_report ORDER BY 1")
    assert rows == [(1,), (3,)]


async def test_segments_of_a_type_that_is_not_registered(
    make_service: Callable[..., Service], database: str, tmp_path: Path
) -> None:
    (tmp_path / "my_events.py").write_text(
        "from datapipe import Event, register\n"
        "@register('signup')\nclass Signup(Event):\n    user_id: int\n    plan: str\n"
    )
    service = make_service(
        database_url=database, load_interval=3600, event_modules=["my_events"]
    )  # fmt: skip
    service._env = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    await service.start()
    for user in (1, 2):
        event = {"event_name": "signup", "user_id": user, "plan": "free"}
        assert (await service.post(event))[0] == 200
    await service.kill()

    service.settings |= {"event_modules": [], "load_interval": 0.2}
    await service.start()
    await service.post(crash())

    async def told() -> bool:
        return "signup" in (await service.status())["lanes"]

    await until(told, what="the lane of the unknown type")
    await until(lambda: _loaded(service, "crash_report", 1))
    status = await service.status()
    lane = status["lanes"]["signup"]
    assert (lane["waiting"], lane["loaded"], lane["recovered"]) == (2, 0, 2)
    assert "signup" in lane["blocked"]
    assert status["books"]["balanced"]
    assert service.logged("lane blocked")[0]["lane"] == "signup"
    assert "blocked" in (await service.load())["failed"]["signup"]
    event = {"event_name": "signup", "user_id": 3, "plan": "free"}
    assert (await service.post(event))[1]["status_code"] == 7
    async with service.session.get(f"{service.url}/") as response:
        assert "signup" in await response.text()
    assert await service.stop() == 0

    service.settings |= {"event_modules": ["my_events"]}
    await service.start()
    await until(lambda: _loaded(service, "signup", 2))
    rows = Postgres.execute(database, "SELECT user_id, plan FROM signup ORDER BY 1")
    assert rows == [(1, "free"), (2, "free")]


async def _loaded(service: Service, lane: str, rows: int) -> bool:
    return bool((await service.status())["lanes"].get(lane, {}).get("loaded") == rows)


async def test_segments_of_an_older_class_still_load(
    make_service: Callable[..., Service], database: str
) -> None:
    old = {"user_id": "int", "gone": "str", "kept": "str"}
    service = make_service(database_url=database, load_interval=3600, events={"signup": old})
    await service.start()
    event = {"event_name": "signup", "user_id": 1, "gone": "g", "kept": "k"}
    await service.post(event)
    await service.kill()
    new = {"kept": "str", "user_id": "int", "new": "int = 5"}
    service.settings |= {"events": {"signup": new}}
    await service.start()
    await until(lambda: _loaded(service, "signup", 1))
    sql = "SELECT user_id, kept, new, gone FROM signup"
    assert Postgres.execute(database, sql) == [(1, "k", 5, "g")]
