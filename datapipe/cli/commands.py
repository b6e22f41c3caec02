"""The commands that are not the service: check, load, status, schema."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from datapipe import logs
from datapipe.cli.answers import unanswered
from datapipe.cli.configuration import require
from datapipe.cli.new_event import class_text
from datapipe.cli.terminal import print_json, progress, show_status
from datapipe.errors import (
    ConfigError,
    DatapipeError,
    LaneBlocked,
    SinkUnavailable,
)
from datapipe.events.registry import Registry, load_registry
from datapipe.http.ingest_keys import check_lanes
from datapipe.mirrors import check_mirror, open_mirror
from datapipe.monitor.peers import services
from datapipe.pipeline.buffer import Buffer
from datapipe.pipeline.coordinator import Coordinator, new_process_id
from datapipe.pipeline.loader import Loader
from datapipe.pipeline.records import Records
from datapipe.pipeline.tasks import ended_by_failure
from datapipe.pipeline.unknown import ALL
from datapipe.settings import Settings, plugin
from datapipe.sinks import Database, Table, open_sink, table_of

_NAMED = 10  # names of unknown events, by `check`
_WELL = ("healthy", "starting", "recovering")  # for `status`: what passes by itself is no failure


async def check(settings: Settings, args: argparse.Namespace) -> int:
    """Read the settings, reach database and mirror, verify the journals; a line for each.

    With `--release`, what can't be reached is no failure: the service starts without it, accepts
    events and loads them later. What answers and refuses us is one: no restart repairs that.

    Raises: ConfigError, DatapipeError.
    """
    away = "warn" if args.release else "fail"
    logs.configure("critical", settings.log_format)
    registry = load_registry(settings)
    check_lanes(settings.ingest_keys, registry.types)
    names = ", ".join(sorted(registry.types))
    findings: list[dict[str, str]] = []

    def report(found: Iterable[tuple[str, str]]) -> None:
        for level, text in found:
            findings.append({"level": away if level == "away" else level, "text": text})
            if not args.json:
                print("{level:<5} {text}".format(**findings[-1]))

    types = "event type" if len(registry.types) == 1 else f"{len(registry.types)} event types"
    report([("ok", f"settings: {types}: {names}")])
    if running := await services(Path(settings.data_dir)):
        report([("ok", f"service: running here {_who(running)}")])
    embedded = plugin(settings, "sink").kept_in(settings)
    async with open_sink(settings, new_process_id()) as sink:
        if embedded and not embedded.is_dir():
            report([("ok", f"database: none yet in {embedded}; the service makes it")])
        else:
            tables = [table_of(kind) for kind in registry.lanes.values()]
            report(await sink.check(tables))
            report(await _unknown_findings(sink, registry))
        report(await check_mirror(settings, sink.find_mark))
    ok = all(each["level"] != "fail" for each in findings)
    if args.json:
        print_json({"ok": ok, "data_dir": settings.data_dir, "findings": findings})
    return int(not ok)


def _who(running: Sequence[Mapping[str, Any]]) -> str:
    """Which processes of a service run here, and where they listen."""
    addresses = sorted({each["address"] for each in running if each["address"]})
    pids = ", ".join(str(each["pid"]) for each in running)
    return f"({', '.join([f'pid {pids}', *addresses])})"


async def _unknown_findings(sink: Database, registry: Registry) -> list[tuple[str, str]]:
    """Kept events of unknown types, for `check`; nothing if the database is down: it said so."""
    try:
        groups = (await sink.find(ALL, 0))["groups"] if sink.state().up is not False else []
    except (SinkUnavailable, LaneBlocked):
        return []
    waiting = [group for group in groups if group["event_name"] not in registry.types]
    said = []
    if waiting:
        count = sum(group["count"] for group in waiting)
        names = ", ".join(f"{each['event_name']} ({each['count']:,})" for each in waiting[:_NAMED])
        more = f" and {len(waiting) - _NAMED:,} other names" if len(waiting) > _NAMED else ""
        text = f"{count:,} are kept: {names}{more}; see datapipe unknown list"
        said.append(("ok", f"unknown events: {text}"))
    for group in groups:
        if (name := group["event_name"]) in registry.types:
            text = "whose type is registered by now: datapipe unknown replay moves them"
            said.append(("warn", f"unknown events: {group['count']:,} of {name}, {text}"))
    return said


async def load(settings: Settings, args: argparse.Namespace) -> int:
    """Load what waits in mirrors without a living owner, once; 1 if anything still waits.

    Raises: DatapipeError: a worker died.
    """
    logs.configure("warning", settings.log_format)
    registry = load_registry(settings)
    if running := await services(Path(settings.data_dir)):
        text = f"a service is running here {_who(running)}, and loads itself what it has taken"
        print(f"datapipe: {text}", file=sys.stderr, flush=True)
    process = new_process_id()
    loaded: Counter[str] = Counter()
    failed: dict[str, str] = {}
    async with (
        ended_by_failure() as died,
        open_sink(settings, process) as sink,
        open_mirror(settings, process) as mirror,
    ):
        buffer = Buffer(mirror, settings, lambda seconds: None, died)
        loader = Loader(buffer, sink, registry, settings, Records(), lambda seconds: None)
        coordinator = Coordinator(buffer, loader, sink, process)
        waiting = partial(_waiting, buffer)
        async with loader.running(died), progress("loading events", waiting):
            async for _ in coordinator.looks():
                rows, failed = await loader.load_now(accept_dead=args.accept_dead)
                loaded.update(rows)
            await buffer.settle(10.0)
            with suppress(DatapipeError):  # ledger rows of what was drained may be deleted
                await mirror.keep(coordinator)
            await coordinator.deregister()
    for lane, count in sorted(loaded.items()):
        print(f"loaded {lane}: {count} rows")
    for lane, why in sorted(failed.items()):
        print(f"failed {lane}: {why}", file=sys.stderr)
    print(f"waiting: {waiting()}")
    return 1 if waiting() else 0


def _waiting(buffer: Buffer) -> int:
    return sum(lane.waiting.events for lane in buffer.lanes.values())


async def status(settings: Settings, args: argparse.Namespace) -> int:
    """Print what the page of a running service shows; 1 if something is wrong.

    Without a URL it is the one that runs with the same `data_dir`, which needs no key.

    Raises: DatapipeError: it does not answer, or refuses.
    """
    logs.configure("critical", settings.log_format)
    running = [] if args.url else await services(Path(settings.data_dir), status=True)
    if running:
        shown = running[0]["status"]
        who = f"a service is running here {_who(running)}, with {settings.data_dir}"
        print(f"datapipe: {who}", file=sys.stderr, flush=True)
    else:
        shown = await _status_of(settings, args.url)
    try:
        shown.pop("history", None)  # the series of the charts
        print_json(shown) if args.json else show_status(shown)
        return int(shown["summary"]["state"] not in _WELL)
    except (KeyError, TypeError) as exc:
        raise DatapipeError("this is not datapipe: its /status.json can't be read") from exc


async def _status_of(settings: Settings, named: str | None) -> dict[str, Any]:
    """What `/status.json` has. Args: named: the URL that was given."""
    url = (named or f"http://127.0.0.1:{settings.port}").rstrip("/")
    here = "" if named else f", and no service runs with {settings.data_dir}"
    headers = {"Authorization": f"Bearer {settings.admin_key}"} if settings.admin_key else {}
    timeout = aiohttp.ClientTimeout(total=10)
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
            session.get(f"{url}/status.json") as response,
        ):
            if response.status == 401:
                raise DatapipeError(f"{url} needs the admin key: set DATAPIPE_ADMIN_KEY")
            if response.status != 200:
                raise DatapipeError(f"{url} answers {response.status} {response.reason}")
            return msgspec.json.decode(await response.read(), type=dict[str, Any])
    except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as exc:
        raise DatapipeError(f"{url} is not a URL like http://HOST:PORT") from exc
    except (aiohttp.ClientError, TimeoutError) as exc:
        raise DatapipeError(f"{url} does not answer: {unanswered(exc)}{here}") from exc
    except msgspec.MsgspecError as exc:
        raise DatapipeError(f"{url} is not datapipe: its /status.json can't be read") from exc


async def schema(settings: Settings, args: argparse.Namespace) -> int:
    """Print the DDL for all event types and our own tables; make what is missing; adopt a table.

    Raises: SinkUnavailable: the database does not answer. LaneBlocked: a table can't be adopted.
    ConfigError: there is no event type of that name.
    """
    tables = [table_of(kind) for kind in load_registry(settings).lanes.values()]
    adopted = [table for table in tables if table.name in args.adopt and not table.is_own]
    if unknown := set(args.adopt) - {table.name for table in adopted}:
        raise ConfigError(f"--adopt: there is no event type {min(unknown)!r}")
    if args.apply or adopted:
        require(settings, "sink")
    logs.configure("critical", settings.log_format)  # what is printed is all that is said
    async with open_sink(settings, new_process_id()) as sink:
        for table in adopted:
            await sink.adopt(table, print)
        if adopted and not args.apply:
            return 0
        if args.apply:
            return await _apply(sink, tables)
        print(sink.ddl(tables), end="")
    return 0


async def _apply(sink: Database, tables: Sequence[Table]) -> int:
    """Make what is missing, by the rules of a load, and print the DDL that has been run.

    1 if a table can't be made; the others are.
    """
    made, failed = 0, False
    for table in tables:
        try:
            statements = await sink.prepare(table) + await sink.make_ahead(table)
        except SinkUnavailable as exc:
            if exc.everywhere:
                raise
            failed = True
            print(f"datapipe: table {table.name}: {exc}", file=sys.stderr)
        except LaneBlocked as exc:
            failed = True
            print(f"datapipe: {exc}", file=sys.stderr)
        else:
            made += len(statements)
            print("".join(f"{statement};\n\n" for statement in statements), end="")
    if not (made or failed):
        print("nothing is missing")
    return int(failed)


async def new_event(settings: Settings, args: argparse.Namespace) -> int:
    """Print the class of a new event type."""
    print(class_text(args.name, args.fields), end="")
    return 0
