"""`datapipe serve`: the port, the signals, the end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import structlog

from datapipe import logs
from datapipe.app import PIPELINE, Pipeline, create_app, create_runner
from datapipe.errors import DatapipeError
from datapipe.http.port import Port, raise_limit
from datapipe.settings import Settings

log = structlog.stdlib.get_logger("datapipe.cli.serve")


async def serve(settings: Settings, args: argparse.Namespace) -> int:
    """Run the service until SIGTERM or SIGINT: exit 0; 1 if a part of it died.

    Raises: ConfigError, DatapipeError: it can't start.
    """
    logs.configure(settings.log_level, settings.log_format, queued=True)
    files = raise_limit()
    app = create_app(settings)
    runner = create_runner(app)
    pipeline = app[PIPELINE]
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    with _signals_into(signals):
        try:
            await runner.setup()
            assert runner.server is not None
            port = Port(runner.server, files)
            async with _listening(port, settings):
                address = _address(port, settings)
                log.info("listening", address=address, pid=os.getpid(), mirror=settings.mirror_kind)
                hints: set[asyncio.Future[Any]] = set()
                if getattr(args, "try_out", False):
                    hints.add(asyncio.ensure_future(_print_hints(pipeline, address)))
                # what start-up made stays for good: the collector need not look at it each time
                gc.collect()
                gc.freeze()
                gc.set_threshold(20_000, 20, 20)
                code = await _until_the_end(pipeline, signals, hints)
            await _stop(pipeline, signals)
        finally:
            await runner.cleanup()
    return code


@contextlib.asynccontextmanager
async def _listening(port: Port, settings: Settings) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(port.listening(settings))
        except OSError as exc:
            raise DatapipeError(_why_not(exc, f"{settings.host}:{settings.port}")) from exc
        yield


def _why_not(exc: OSError, where: str) -> str:
    if exc.errno == errno.EADDRINUSE:
        return f"port: {where} is taken; stop what listens there, or set another port (PORT)"
    return f"host: can't listen on {where}: {exc.strerror}"


def _address(port: Port, settings: Settings) -> str:
    """As the settings name it, or, where they leave the port open, as it was bound."""
    host, number = port.addresses[0]
    if settings.port:
        host = settings.host or "0.0.0.0"
    return f"http://[{host}]:{number}" if ":" in host else f"http://{host}:{number}"


async def _until_the_end(
    pipeline: Pipeline, signals: asyncio.Queue[signal.Signals], hints: set[asyncio.Future[Any]]
) -> int:
    assert pipeline.failed is not None
    signalled = asyncio.ensure_future(signals.get())
    ends: set[asyncio.Future[Any]] = {signalled, pipeline.failed}
    # a database that takes its time to be made must not keep a signal waiting
    await asyncio.wait(ends | hints, return_when=asyncio.FIRST_COMPLETED)
    for printed in hints:
        if printed.done():
            printed.result()
        else:
            printed.cancel()
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if signalled.done():
        log.info("stopping", signal=signalled.result().name)
        return 0
    signalled.cancel()
    log.critical("stopping", error=str(pipeline.failed.exception()))
    return 1


async def _stop(pipeline: Pipeline, signals: asyncio.Queue[signal.Signals]) -> None:
    """Finish requests and load what waits; a second signal skips the loading."""
    stopping = asyncio.ensure_future(pipeline.stop())
    again = asyncio.ensure_future(signals.get())
    ends: set[asyncio.Future[Any]] = {stopping, again}
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        log.info("stopping", signal=again.result().name, loading=False)
        pipeline.loader.sink.abort()
        stopping.cancel()
    again.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await stopping


@contextlib.contextmanager
def _signals_into(queue: asyncio.Queue[signal.Signals]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, queue.put_nowait, number)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)  # the process ends now: nothing to interrupt


async def _print_hints(pipeline: Pipeline, address: str) -> None:
    """What `make run` shows: three lines that work as printed."""
    psql = await pipeline.loader.sink.hint()
    event = '{"event_name": "crash_report","user_id": 888,"timestamp": 1000,"message": "have_fun"}'
    print(
        f"\n  page   {address}/\n  post   curl -d '{event}' {address}/\n  rows   {psql}\n",
        file=sys.stderr, flush=True,
    )  # fmt: skip
