"""The service, wired together: start reading here.

    POST /  ->  ingest  ->  buffer (lanes, mirrored)  ->  loader  ->  sink
                              status, pages: read the books

`create_app` gives an aiohttp application; `create_runner` the runner that serves it best;
`gunicorn_app` is that runner for gunicorn.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web
from msgspec import structs

from datapipe import logs
from datapipe import settings as settings_module
from datapipe.errors import ConfigError, DatapipeError
from datapipe.events.registry import Registry, load_registry
from datapipe.http.admin import Admin
from datapipe.http.auth import Access, Credentials
from datapipe.http.body import Body
from datapipe.http.cors import Cors
from datapipe.http.heads import PATHS
from datapipe.http.ingest import Ingest
from datapipe.http.ingest_keys import IngestKeys
from datapipe.http.pages import Pages, add_headers, errors_are_answers
from datapipe.http.port import raise_limit
from datapipe.http.responses import request_id
from datapipe.http.runner import Runner, report_answered
from datapipe.http.server import Connection
from datapipe.mirrors import Mirror, open_mirror
from datapipe.monitor.feed import running
from datapipe.monitor.metrics import Metrics
from datapipe.monitor.peers import ClusterPeers, LocalPeers, Own, Peers
from datapipe.monitor.status import Status
from datapipe.pipeline.allocator import share_one_arena
from datapipe.pipeline.buffer import Buffer
from datapipe.pipeline.coordinator import Coordinator, new_process_id
from datapipe.pipeline.dead_letters import DeadLetters
from datapipe.pipeline.loader import Loader
from datapipe.pipeline.records import Records
from datapipe.pipeline.unknown import Unknown
from datapipe.settings import Settings
from datapipe.sinks import Database, open_sink, table_of

OpenMirror = Callable[[Settings, str], AbstractAsyncContextManager[Mirror]]
OpenSink = Callable[[Settings, str], AbstractAsyncContextManager[Database]]

# what `Pipeline.reload` changes; all else stays as it was at the start
RELOADED = (
    "ingest_keys", "admin_key", "cors_origins", "log_level", "load_interval", "load_min_interval",
)  # fmt: skip
REQUESTS_GRACE_S = 5.0  # at a stop, for requests that were already received

log = structlog.stdlib.get_logger("datapipe.app")


class Pipeline:
    """One running service: opened from the sink to the port, closed in the reverse order.

    Attributes:
        failed: a background task has died.
        try_out: it is `make run`: tables are made at the start, for people to look at.
        address: the URL at which it listens, once it does; None: somebody else has the port.
        on_failure: called once when that happens; it must end the service.
    """

    def __init__(
        self, settings: Settings, registry: Registry, open_mirror: OpenMirror, open_sink: OpenSink
    ) -> None:
        self.settings = settings
        self.registry = registry
        self.failed = False
        self.try_out = False
        self.address: str | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._open_mirror = open_mirror
        self._open_sink = open_sink
        self._stopped = False
        self._records = Records()
        self.keys = IngestKeys(settings.ingest_keys, self._records, registry.types)
        self.access = Access(settings)
        self.cors = Cors(settings.cors_origins)

    async def run(self, app: web.Application) -> AsyncIterator[None]:
        """The application's one cleanup context."""
        process = new_process_id()
        metrics = Metrics()
        async with AsyncExitStack() as stack:
            sink = await stack.enter_async_context(self._open_sink(self.settings, process))
            mirror = await stack.enter_async_context(self._open_mirror(self.settings, process))
            self.buffer = Buffer(
                mirror, self.settings, metrics.append_seconds.observe, self._task_died
            )
            records = self._records
            self.loader = Loader(
                self.buffer, sink, self.registry, self.settings, records,
                metrics.load_seconds.observe,
            )  # fmt: skip
            tables = [table_of(kind) for kind in self.registry.lanes.values()]
            kept = [table_of(kind) for kind in self.registry.kinds.values()]
            self.coordinator = Coordinator(
                self.buffer, self.loader, sink, process, tables if self.try_out else (),
                [table for table in kept if table.partition or table.retention_s],
            )  # fmt: skip
            self.ingest = Ingest(
                self.buffer, self.registry, self.settings, self.keys, self.cors, records,
                metrics.request_seconds.observe,
            )  # fmt: skip
            dead = DeadLetters(sink, self.registry)
            unknown = Unknown(sink, self.registry, dead)
            local = LocalPeers(Path(self.settings.data_dir), process)
            peers: Peers = local
            if mirror.channel is not None:
                peers = ClusterPeers(mirror.channel, lambda: self.coordinator.living)
            self.status = Status(
                self.buffer, self.loader, self.coordinator, records, dead, metrics, process,
                peers, local,
            )  # fmt: skip
            self.feed = await stack.enter_async_context(running(self.status, self._task_died))
            Pages(
                self.status, self.feed, metrics, self.registry, self.access, dead, unknown
            ).add_to(app)
            admin = Admin(self.loader, dead, unknown, self.access, peers)
            admin.add_to(app)
            await stack.enter_async_context(self.loader.running(self._task_died))
            await stack.enter_async_context(self.coordinator.running(self._task_died))
            await stack.enter_async_context(dead.counting(self._task_died))
            own = Own(self.status.for_peers, admin.load_own, self._service)
            for each in {local, peers}:
                await stack.enter_async_context(each.listening(own))
            stack.push_async_callback(self.stop)
            yield

    async def _service(self, status: bool) -> dict[str, Any]:
        """What commands ask of it through its socket."""
        told: dict[str, Any] = {"pid": os.getpid(), "address": self.address}
        if status:
            await self.status.refresh(history=False)
            told["status"] = self.status.snapshot()
        return told

    def reload(self, settings: Settings) -> tuple[list[str], list[str]]:
        """Take over from other settings what can change while the service runs.

        Requests under way finish with what they had.

        Returns: the keys that have changed, and those that only a restart changes.
        Raises: ConfigError: nothing has changed.
        """
        fields = Settings.__struct_fields__
        differ = [key for key in fields if getattr(settings, key) != getattr(self.settings, key)]
        changed = [key for key in differ if key in RELOADED]
        values = {key: getattr(settings, key) for key in changed}
        settings = structs.replace(self.settings, **values)
        self.keys.reload(settings.ingest_keys)  # the only one that may refuse
        self.access.reload(settings.admin_key)
        self.cors.reload(settings.cors_origins)
        self.loader.reload(settings)
        logs.set_level(settings.log_level)
        self.settings = settings
        return changed, [key for key in differ if key not in RELOADED]

    def _task_died(self, exc: BaseException) -> None:
        if not isinstance(exc, ConfigError):  # what a person must set right needs no traceback
            log.critical("background task died", exc_info=exc)
        if not (self.failed or self._stopped):
            self.failed = True
            log.critical("stopping", error=str(exc))
            self.on_failure()

    async def stop(self, _: web.Application | None = None) -> None:
        """Accept nothing more, finish what was received, load what waits; bounded in time.

        What is left stays in the mirror. Connections may still be open: requests on them are
        answered 503 meanwhile. A second call returns at once.
        """
        if self._stopped:
            return
        self._stopped = self.buffer.stopping = True
        self.buffer.waiters.stop()
        self.feed.end()
        try:
            await self._finish()
        finally:  # a second signal cancels the loading, but not this
            self.buffer.closed = True
            await self.buffer.settle(2.0)
            lanes = self.buffer.lanes.items()
            waiting = {name: lane.waiting.events for name, lane in lanes if lane.waiting.events}
            log.info("stopped", waiting=sum(waiting.values()), lanes=waiting)

    async def _finish(self) -> None:
        started = time.monotonic()
        while self.ingest.admission.requests and time.monotonic() - started < REQUESTS_GRACE_S:
            await asyncio.sleep(0.02)
        self.buffer.closed = True
        left = self.settings.shutdown_timeout - (time.monotonic() - started)
        if left > 0:
            try:
                async with asyncio.timeout(left):
                    await self.loader.drain()
                    await self.buffer.settle(2.0)
                    await self.coordinator.deregister()
            except TimeoutError:
                log.warning("drain not done in time", seconds=self.settings.shutdown_timeout)

    async def post(self, request: web.Request) -> web.StreamResponse:
        """A POST of events, as aiohttp has it."""

        async def read() -> bytes:
            if request.transport is None:  # aiohttp would raise RuntimeError
                raise ConnectionResetError("the client has left")
            return await request.content.readany()

        id = request_id(request.headers)
        authorization = request.headers.get("Authorization")
        credentials = Credentials(authorization, request.query.get("key"))
        body = Body(request.content_length, read)
        transport = request.transport
        connection = None if transport is None else transport.get_protocol()
        gone = connection.gone if isinstance(connection, Connection) else None
        answer = await self.ingest.answer(request.headers, credentials, body, id, gone)
        response = answer.response()
        response.headers["X-Request-ID"] = id
        return response


PIPELINE = web.AppKey("pipeline", Pipeline)


def create_app(
    settings: Settings | None = None,
    *,
    open_mirror: OpenMirror = open_mirror,
    open_sink: OpenSink = open_sink,
) -> web.Application:
    """The service as an aiohttp application.

    Args:
        settings: read from their usual sources when not given.
        open_mirror, open_sink: what opens them; tests pass doubles.
    Raises: ConfigError: a setting or an event type is wrong.
    """
    settings = settings or settings_module.load()
    settings_module.check(settings)
    pipeline = Pipeline(settings, load_registry(settings), open_mirror, open_sink)
    middlewares = [report_answered, errors_are_answers]
    app = web.Application(middlewares=middlewares, handler_args={"auto_decompress": False})
    app[PIPELINE] = pipeline
    for path in PATHS:
        app.router.add_post(path, pipeline.post)
    app.cleanup_ctx.append(pipeline.run)
    app.on_shutdown.append(pipeline.stop)
    app.on_response_prepare.append(add_headers)
    pipeline.cors.add_to(app)
    return app


def create_runner(app: web.Application, kind: type[Runner] = Runner) -> Runner:
    """The runner that serves plain `POST /` by itself and closes connections with slow heads."""
    pipeline = app[PIPELINE]
    return kind(
        app, lambda: pipeline.ingest, pipeline.settings.request_timeout,
        access_log=None, shutdown_timeout=1.0, lingering_time=3.0, handle_signals=False,
    )  # fmt: skip


def end_process() -> None:
    """End this process as a SIGTERM from outside would: for `Pipeline.on_failure`."""
    os.kill(os.getpid(), signal.SIGTERM)


async def gunicorn_app() -> web.AppRunner:
    """The service in a worker of gunicorn: `gunicorn -k aiohttp.GunicornWebWorker`.

    gunicorn owns the port, the processes and the signals; `host`, `port` and `reuse_port` have no
    effect. A background task that dies ends its worker, and gunicorn starts another.
    """
    share_one_arena()
    logs.configure("info", "auto")
    raise_limit()
    with _failure_logged():
        # a loopback `host` would let anybody act as admin without a key, wherever gunicorn listens
        settings = structs.replace(settings_module.load(), host="")
        logs.configure(settings.log_level, settings.log_format, queued=True)
        app = create_app(settings)
    app[PIPELINE].on_failure = end_process
    return create_runner(app, _InWorker)


class _InWorker(Runner):
    async def setup(self) -> None:
        with _failure_logged():
            await super().setup()
        log.info("listening", pid=os.getpid(), mirror=self.app[PIPELINE].settings.mirror_kind)

    async def cleanup(self) -> None:
        log.info("stopping")
        await super().cleanup()


@contextmanager
def _failure_logged() -> Iterator[None]:
    """Log in one line why the service does not start; gunicorn would print a traceback."""
    try:
        yield
    except (DatapipeError, OSError) as exc:
        log.critical("not started", error=" ".join(str(exc).split()))
        raise SystemExit(3) from None  # gunicorn's WORKER_BOOT_ERROR: it exits instead of retrying
