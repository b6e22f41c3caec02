"""`datapipe serve`: port, signals, reload, shutdown."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import gc
import json
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import structlog

from datapipe import logs
from datapipe.app import PIPELINE, Pipeline, create_app, create_runner, end_process
from datapipe.cli import notify
from datapipe.errors import DatapipeError
from datapipe.events.types import EventType
from datapipe.http.openapi import example
from datapipe.http.port import Port, raise_limit
from datapipe.pipeline.allocator import share_one_arena
from datapipe.settings import Settings

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

log = structlog.stdlib.get_logger("datapipe.cli.serve")


async def serve(settings: Settings, args: argparse.Namespace) -> int:
    """Run the service until SIGTERM or SIGINT: exit 0; 1 if a part of it died. SIGHUP reloads.

    Raises: ConfigError, DatapipeError: it can't start.
    """
    share_one_arena()
    logs.configure(settings.log_level, settings.log_format, queued=True)
    files = raise_limit()
    app = create_app(settings)
    runner = create_runner(app)
    pipeline = app[PIPELINE]
    pipeline.on_failure = end_process
    pipeline.try_out = args.try_out
    async with _signals() as signals, notify.watchdog():
        try:
            await runner.setup()
            port = Port(runner.server, files)
            async with _listening(port, settings):
                pipeline.address = address = _address(port, settings)
                log.info(
                    "listening", address=address, pid=os.getpid(), mirror=settings.mirror_kind,
                    data_dir=settings.data_dir,
                )  # fmt: skip
                notify.ready(f"listening on {address}")
                # what start-up made stays for good: the garbage collector need not scan it
                gc.collect()
                gc.freeze()
                gc.set_threshold(20_000, 20, 20)
                ended = asyncio.ensure_future(_end(pipeline, signals, args.load))
                if args.try_out:
                    await _print_hints(pipeline, address, ended)
                number = await ended
                notify.stopping()
                if not pipeline.failed:
                    log.info("stopping", signal=number.name)
            await _stop(pipeline, signals)
        finally:
            await runner.cleanup()
    return int(pipeline.failed)


@contextlib.asynccontextmanager
async def _listening(port: Port, settings: Settings) -> AsyncIterator[None]:
    """Raises: DatapipeError: it can't listen there."""
    where = f"{settings.host}:{settings.port}"
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(port.listening(settings))
        except OSError as exc:
            why = f"host: can't listen on {where}: {exc.strerror}"
            if exc.errno == errno.EADDRINUSE:
                why = f"port: {where} is taken; stop what listens there, or set another port (PORT)"
            if exc.errno == errno.EACCES:
                why = f"port: {where} needs CAP_NET_BIND_SERVICE; or set another port (PORT)"
            raise DatapipeError(why) from exc
        yield


def _address(port: Port, settings: Settings) -> str:
    """As the settings name it, or, where they say port 0, as it was bound."""
    host, number = port.addresses[0]
    if settings.port:
        host = settings.host or "0.0.0.0"
    return f"http://[{host}]:{number}" if ":" in host else f"http://{host}:{number}"


async def _end(
    pipeline: Pipeline, signals: asyncio.Queue[signal.Signals], load: Callable[[], Settings]
) -> signal.Signals:
    """Reload at each SIGHUP; the signal that ends the service."""
    had_terminal = _has_terminal()
    while (number := await signals.get()) is signal.SIGHUP:
        if had_terminal and not _has_terminal():
            break  # a terminal that closes sends it, too, and nobody could end us with Ctrl-C
        _reload(pipeline, load)
    return number


def _has_terminal() -> bool:
    with contextlib.suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        return True
    return False


def _reload(pipeline: Pipeline, load: Callable[[], Settings]) -> None:
    """Read the settings anew, and take over what can change while the service runs."""
    notify.reloading()
    try:
        changed, kept = pipeline.reload(load())
    except (DatapipeError, OSError) as exc:
        log.error("settings not reloaded", error=" ".join(str(exc).split()))
        return
    finally:
        notify.ready(f"listening on {pipeline.address}")
    log.info("settings reloaded", changed=changed)
    if kept:
        log.warning("settings need a restart", settings=kept)


async def _stop(pipeline: Pipeline, signals: asyncio.Queue[signal.Signals]) -> None:
    """Finish requests and load what waits; a second signal skips the loading."""
    stopping = asyncio.ensure_future(pipeline.stop())
    again = asyncio.ensure_future(_next_end(signals))
    await asyncio.wait({stopping, again}, return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        log.info("stopping", signal=again.result().name, loading=False)
        pipeline.loader.sink.abort()
        stopping.cancel()
    again.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await stopping


async def _next_end(signals: asyncio.Queue[signal.Signals]) -> signal.Signals:
    while (number := await signals.get()) is signal.SIGHUP:
        pass
    return number


@contextlib.asynccontextmanager
async def _signals() -> AsyncIterator[asyncio.Queue[signal.Signals]]:
    """What ends or reloads the service, as it arrives; ignored after the block: it has ended."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in _SIGNALS:
        loop.add_signal_handler(number, queue.put_nowait, number)
    try:
        yield queue
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)


async def _print_hints(pipeline: Pipeline, address: str, ended: asyncio.Future[Any]) -> None:
    """Print what `make run` shows, unless a signal comes first: lines that work as printed, but for
    a key.

    Raises: SinkUnavailable, ConfigError: there is no database, and none can be made.
    """
    # creating the database takes time, during which a signal must not wait
    types = pipeline.registry.types
    lane = "crash_report" if "crash_report" in types else next(iter(types))
    hint = asyncio.ensure_future(pipeline.loader.sink.hint(lane))
    await asyncio.wait({hint, ended}, return_when=asyncio.FIRST_COMPLETED)
    if not hint.done():
        hint.cancel()
        return
    post = curl_line(types[lane], address, key=bool(pipeline.settings.ingest_keys))
    print(
        f"\n  page   {address}/\n  post   {post}\n  rows   {hint.result()}\n",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def curl_line(kind: EventType, address: str, *, key: bool) -> str:
    """What posts an example. Args: key: one is needed, which is not shown: KEY stands for it."""
    header = "-H 'Authorization: Bearer KEY' " if key else ""
    return f"curl {header}-d {shlex.quote(json.dumps(example(kind)))} {address}/"
