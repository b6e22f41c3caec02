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
from collections.abc import Iterator
from typing import Any

import structlog
from aiohttp import web

from datapipe import logs
from datapipe.app import PIPELINE, Pipeline, create_app, create_runner
from datapipe.errors import DatapipeError
from datapipe.settings import Settings

log = structlog.stdlib.get_logger("datapipe.serve")

_BACKLOG = 1024


async def serve(settings: Settings, args: argparse.Namespace) -> int:
    """Run the service until SIGTERM or SIGINT: exit 0; 1 if a part of it died.

    Raises: ConfigError, DatapipeError: it can't start.
    """
    logs.configure(settings.log_level, settings.log_format, queued=True)
    app = create_app(settings)
    runner = create_runner(app)
    pipeline = app[PIPELINE]
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    with _signals_into(signals):
        try:
            await runner.setup()
            site = web.TCPSite(
                runner, settings.host, settings.port,
                reuse_port=settings.reuse_port or None, backlog=_BACKLOG,
            )  # fmt: skip
            await _listen(site, settings)
            address = site.name if settings.port else _address(runner)
            log.info("listening", address=address, pid=os.getpid(), mirror=settings.mirror_kind)
            hints: set[asyncio.Future[Any]] = set()
            if getattr(args, "try_out", False):
                hints.add(asyncio.ensure_future(_print_hints(pipeline, address)))
            # what start-up made stays for good: the collector need not look at it again and again
            gc.collect()
            gc.freeze()
            gc.set_threshold(20_000, 20, 20)
            code = await _until_the_end(pipeline, signals, hints)
            await site.stop()
            await _stop(pipeline, signals)
        finally:
            await runner.cleanup()
    return code


async def _listen(site: web.TCPSite, settings: Settings) -> None:
    try:
        await site.start()
    except OSError as exc:
        where = f"{settings.host}:{settings.port}"
        if exc.errno == errno.EADDRINUSE:
            text = f"port: {where} is taken; stop what listens there, or set another port (PORT)"
            raise DatapipeError(text) from exc
        raise DatapipeError(f"host: can't listen on {where}: {exc.strerror}") from exc


def _address(runner: web.AppRunner) -> str:
    host, port = runner.addresses[0][:2]
    return f"http://{host}:{port}"


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
