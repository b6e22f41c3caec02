"""The commands that are not the service: check, load, status, schema."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from functools import partial
from typing import Any

import aiohttp
import msgspec

from datapipe import logs
from datapipe.buffer import Buffer
from datapipe.errors import DatapipeError
from datapipe.housekeeping import new_process_id
from datapipe.loader import Loader
from datapipe.mirrors import open_mirror
from datapipe.registry import load_registry
from datapipe.settings import Settings
from datapipe.sinks import open_sink, table_of
from datapipe.sinks.schema import ddl
from datapipe.terminal import progress, show_status


async def check(settings: Settings, args: argparse.Namespace) -> int:
    """Read the settings, reach database and mirror, verify the journals; a line for each.

    Raises: ConfigError, DatapipeError.
    """
    registry = load_registry(settings)
    print(f"ok    settings: {len(registry.types)} event types: {', '.join(sorted(registry.types))}")
    problems = 0
    async with open_sink(settings, new_process_id()) as sink:
        for line in await sink.check([table_of(kind) for kind in registry.types.values()]):
            problems += _tell(line)
    async with open_mirror(settings, new_process_id()) as mirror:
        for line in await mirror.check():
            problems += _tell(line)
    return 1 if problems else 0


def _tell(line: tuple[str, str]) -> int:
    """Print one finding, of level ok, warn or fail; 1 if it failed."""
    level, text = line
    print(f"{level:<5} {text}")
    return int(level == "fail")


async def load(settings: Settings, args: argparse.Namespace) -> int:
    """Load what waits in mirrors without a living owner, once; 1 if anything still waits."""
    logs.configure("warning", settings.log_format)
    registry = load_registry(settings)
    process = new_process_id()
    loaded: Counter[str] = Counter()
    failed: dict[str, str] = {}
    async with open_sink(settings, process) as sink, open_mirror(settings, process) as mirror:
        buffer = Buffer(mirror, settings, lambda seconds: None)
        loader = Loader(buffer, sink, registry, settings, process, lambda seconds: None)
        waiting = partial(_waiting, buffer)
        async with loader.working(), progress("loading events", waiting):
            async for _ in loader.house.looks():
                rows, failed = await loader.load_now(accept_dead=args.accept_dead)
                loaded.update(rows)
            await buffer.settle(10.0)
            await loader.farewell()
    for lane, count in sorted(loaded.items()):
        print(f"loaded {lane}: {count} rows")
    for lane, why in sorted(failed.items()):
        print(f"failed {lane}: {why}", file=sys.stderr)
    print(f"waiting: {waiting()}")
    return 1 if waiting() else 0


def _waiting(buffer: Buffer) -> int:
    return sum(lane.waiting for lane in buffer.lanes.values())


async def status(settings: Settings, args: argparse.Namespace) -> int:
    """Print what the page of a running service shows.

    Raises: DatapipeError: it does not answer, or not to us.
    """
    url = (args.url or f"http://127.0.0.1:{settings.port}").rstrip("/")
    headers = {"Authorization": f"Bearer {settings.admin_key}"} if settings.admin_key else {}
    timeout = aiohttp.ClientTimeout(total=10)
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
            session.get(f"{url}/status.json") as response,
        ):
            if response.status == 401:
                raise DatapipeError(f"{url} wants the admin key: set DATAPIPE_ADMIN_KEY")
            if response.status != 200:
                raise DatapipeError(f"{url} answers {response.status} {response.reason}")
            show_status(msgspec.json.decode(await response.read(), type=dict[str, Any]))
    except aiohttp.InvalidURL as exc:
        raise DatapipeError(f"{url} is no URL: http://HOST:PORT wanted") from exc
    except (aiohttp.ClientError, TimeoutError) as exc:
        raise DatapipeError(f"{url} does not answer: {exc or 'not in time'}") from exc
    except (msgspec.MsgspecError, KeyError, TypeError) as exc:
        raise DatapipeError(f"{url} is no datapipe: its /status.json can't be read") from exc
    return 0


async def schema(settings: Settings, args: argparse.Namespace) -> int:
    """Print the DDL for all event types and our own tables."""
    kinds = load_registry(settings).types.values()
    print(ddl(settings.database_schema, [table_of(kind) for kind in kinds]), end="")
    return 0
