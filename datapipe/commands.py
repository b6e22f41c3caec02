"""The commands that are not the service: check, load, schema."""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from datapipe import logs
from datapipe.buffer import Buffer
from datapipe.housekeeping import new_process_id
from datapipe.loader import Loader
from datapipe.mirrors import open_mirror
from datapipe.registry import load_registry
from datapipe.settings import Settings
from datapipe.sinks import open_sink, table_of
from datapipe.sinks.schema import ddl


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
        async with loader.working():
            async for _ in loader.house.looks():
                rows, failed = await loader.load_now(accept_dead=args.accept_dead)
                loaded.update(rows)
            await buffer.settle(10.0)
            await loader.farewell()
    for lane, count in sorted(loaded.items()):
        print(f"loaded {lane}: {count} rows")
    for lane, why in sorted(failed.items()):
        print(f"failed {lane}: {why}", file=sys.stderr)
    waiting = sum(lane.waiting for lane in buffer.lanes.values())
    print(f"waiting: {waiting}")
    return 1 if waiting else 0


async def schema(settings: Settings, args: argparse.Namespace) -> int:
    """Print the DDL for all event types and our own tables."""
    kinds = load_registry(settings).types.values()
    print(ddl(settings.database_schema, [table_of(kind) for kind in kinds]), end="")
    return 0
