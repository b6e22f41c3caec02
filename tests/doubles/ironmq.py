"""A stand-in for IronMQ v3: a real HTTP server on 127.0.0.1, with faults to order.

    async with IronMQ() as mq:
        settings = {"ironmq_host": mq.host, "ironmq_project_id": mq.project_id, ...}
        mq.faults.next("reset", after=True, call="post")  # stored, but the answer is lost

The rules of queues and messages are in `ironmq_store`; here are HTTP, faults and the process.

As a process: `python -m tests.doubles.ironmq --port 0 --latency 0.05` prints one line of JSON with
`url`, `project_id` and `token` and serves until SIGTERM or SIGINT. `GET /_control` tells counters
and queue sizes; `POST /_control` takes any of these keys and answers the same:

    {"clear": true, "faults": [{"what": "503", "n": 3, "call": "post"}, {"what": "cut", "rate": 1}],
     "latency": 0.05, "expire_leases": true, "rules": {"empty_ids": "noop"},
     "away": "reset" | "closed" | null, "away_s": 5}

After `away_s` seconds the server is back; "closed" requires it, as it closes `/_control` too.
"""

import argparse
import asyncio
import contextlib
import json
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from types import TracebackType
from typing import Literal, Self, get_args
from urllib.parse import unquote

from aiohttp import web

from tests.doubles.faults import INSTEAD, Fault, Faults
from tests.doubles.ironmq_store import Json, Queue, Refused, Rules, Store

POLL_S = 0.005  # how often a long poll looks again: an injected clock may jump, so no sleep fits
PROXY_PAGE = b"<html><body><h1>%d</h1>No server is available to handle this request.</body></html>"

Effect = Callable[[], Json]
Away = Literal["closed", "reset"]


class Clock:
    """Unix time that a test moves on."""

    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


class IronMQ:
    """The server, open between `async with` and its end. Nothing is kept beyond it.

    Args: clock: seconds; drives delays, leases, expiry and `wait`. port: 0 takes a free one.
        latency: seconds added to each answer, after the call has taken effect. seed: of reservation
        ids and of the dice for faults with a rate. rules: see `Rules`.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.time,
        port: int = 0,
        latency: float = 0.0,
        seed: int = 0,
        rules: Rules | None = None,
        project_id: str = "5f00c0ffee00000000000001",
        token: str = "stand-in-token",
    ) -> None:
        self.clock = clock
        self.port = port
        self.latency = latency
        self.rules = rules or Rules()
        self.project_id = project_id
        self.token = token
        self.faults = Faults(seed)
        self.requests: Counter[str] = Counter()  # by call, failed ones too; `.total()` is all
        self.statuses: Counter[int] = Counter()  # of the answers sent
        self.away: Away | None = None
        self._store = Store(project_id, self.rules, clock, seed)
        self._back: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    host = url  # as the setting ironmq_host takes it

    @property
    def queues(self) -> dict[str, Queue]:
        return {name: self._store.queue(name) for name in self._store.queues}

    def queue(self, name: str) -> Queue:
        """The queue as of now; one that does not exist reads as empty."""
        return self.queues.get(name) or Queue(name, self.rules)

    def put(self, queue: str, bodies: list[str]) -> None:
        """Messages on a queue, as if somebody had posted them."""
        self._store.post(queue, {"messages": [{"body": body} for body in bodies]})

    def expire_leases(self) -> None:
        """End every reservation now."""
        self._store.expire_leases()

    @property
    def connections(self) -> int:
        return len(self._server.connections)

    @property
    def peak_connections(self) -> int:
        return self._server.peak

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Return once the condition holds. Raises: TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(POLL_S)

    # -- the sockets

    async def __aenter__(self) -> Self:
        self._server = _Server(self._handle, access_log=None)
        self._runner = web.ServerRunner(self._server, shutdown_timeout=0.05)
        await self._runner.setup()
        self._hold_port()
        await self._listen()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._back:
            self._back.cancel()
        await self._runner.cleanup()
        self._socket.close()

    def _hold_port(self) -> None:
        """Bind without listening: connections are refused, and nobody else gets the port."""
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", self.port))
        self.port = self._socket.getsockname()[1]

    async def _listen(self) -> None:
        self._site = web.SockSite(self._runner, self._socket, backlog=1024)
        await self._site.start()

    async def leave(
        self,
        how: Away = "closed",
        back_after_s: float | None = None,
        spare: asyncio.Transport | None = None,
    ) -> None:
        """Go away: connections are refused ("closed"), or taken and reset at the first request.

        Open connections are reset, but for `spare`.
        """
        await self.come_back()
        self.away = how
        if how == "closed":
            await self._site.stop()
            self._socket.close()
            self._hold_port()
        for connection in self._server.connections:
            if connection.transport is not spare:
                _reset(connection.transport)
        if back_after_s is not None:
            self._back = asyncio.create_task(self._back_after(back_after_s))

    async def come_back(self) -> None:
        """Serve again on the same port, with all that was stored."""
        if self._back and self._back is not asyncio.current_task():
            self._back.cancel()
        self._back = None
        if self.away == "closed":
            await self._listen()
        self.away = None

    async def _back_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.come_back()

    # -- a request

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/_control":
            return await self._control(request)
        body = await self._body(request)
        call, effect = self._route(request, {} if isinstance(body, Refused) else body)
        self.requests[call] += 1
        fault = Fault("reset") if self.away else self.faults.take(call)
        status = 0
        answer: Json = {}
        if fault is None or fault.after or fault.what not in INSTEAD:
            try:
                self._admit(request)
                if isinstance(body, Refused):
                    raise body
                status, answer = await self._perform(request, call, effect, body, fault)
            except Refused as refused:
                status, answer = refused.status, {"msg": refused.msg}
        pause = self.latency + (fault.seconds if fault and fault.what == "late" else 0)
        if pause:
            await asyncio.sleep(pause)
        return await self._send(request, status, answer, fault)

    async def _body(self, request: web.BaseRequest) -> Json | Refused:
        try:
            raw = await request.read()
        except web.HTTPRequestEntityTooLarge:  # aiohttp's own bound, 1 MiB
            return Refused(self.rules.oversize_status, "Request is too large")
        size = len(raw)
        if self.rules.count_head:
            size += len(request.path_qs) + sum(len(k) + len(v) + 4 for k, v in request.raw_headers)
        if size > self.rules.max_bytes:
            return Refused(self.rules.oversize_status, "Request is too large")
        if request.path.endswith("/webhook"):  # the body is the message (5.15)
            return {"messages": [{"body": raw.decode(errors="replace")}]}
        try:
            body = json.loads(raw or b"{}")
        except (ValueError, RecursionError):
            return Refused(400, "Request is not JSON")
        return body if isinstance(body, dict) else Refused(400, "Request is not a JSON object")

    def _admit(self, request: web.BaseRequest) -> None:
        if (
            request.headers.get("Authorization") != f"OAuth {self.token}"
            and request.query.get("oauth") != self.token
        ):
            raise Refused(401, "Invalid authentication")
        if not request.path.startswith(f"/3/projects/{self.project_id}/"):
            raise Refused(404, "Project not found")

    def _route(self, request: web.BaseRequest, body: Json) -> tuple[str, Effect]:
        """The name of a call, and the call (5). Names are decoded after the path is split."""
        method, store = request.method, self._store
        if method == "POST":
            method = request.headers.get("X-HTTP-Method-Override", method).upper()
        path = request.raw_path.partition("?")[0]
        match method, *map(unquote, path.split("/")[4:]):
            case "POST", "queues", q, "messages":
                return "post", lambda: store.post(q, body)
            case "POST", "queues", q, "reservations":
                return "reserve", lambda: store.reserve(q, body)
            case "DELETE", "queues", q, "messages":
                call = "delete_many" if body.get("ids") is not None else "clear"
                return call, lambda: store.delete_many(q, body)
            case "DELETE", "queues", q, "messages", id:
                return "delete", lambda: store.delete(q, id, body)
            case "GET", "queues", q, "messages":
                return "peek", lambda: store.peek(q, dict(request.query))
            case "GET", "queues", q, "messages", id:
                return "get", lambda: store.get(q, id)
            case "POST", "queues", q, "messages", id, "touch":
                return "touch", lambda: store.touch(q, id, body)
            case "POST", "queues", q, "messages", id, "release":
                return "release", lambda: store.release(q, id, body)
            case "PUT", "queues", q:
                return "put_queue", lambda: store.put_queue(q, body)
            case "PATCH", "queues", q:
                return "patch_queue", lambda: store.patch_queue(q, body)
            case "DELETE", "queues", q:
                return "delete_queue", lambda: store.delete_queue(q)
            case "GET", "queues", q:
                return "info", lambda: store.info(q)
            case "GET", "queues":
                return "list", lambda: store.list_queues(dict(request.query))
            case "POST", "queues", q, "webhook":
                return "webhook", lambda: store.post(q, body)
        return "unknown", _nothing_here

    async def _perform(
        self,
        request: web.BaseRequest,
        call: str,
        effect: Effect,
        body: Json,
        fault: Fault | None,
    ) -> tuple[int, Json]:
        if fault and fault.what == "expire":
            self._store.expire_leases()
        answer = effect()
        if fault and fault.what == "duplicate":
            effect()
        if call == "reserve" and not answer["messages"]:
            deadline = self.clock() + (body.get("wait") or 0)
            while not answer["messages"] and self.clock() < deadline:
                await asyncio.sleep(POLL_S)
                if request.transport is None or self.away:
                    break  # nobody is left to reserve for
                answer = effect()
        return 201 if call in ("post", "webhook") else 200, answer

    async def _send(
        self, request: web.BaseRequest, status: int, answer: Json, fault: Fault | None
    ) -> web.StreamResponse:
        what = fault.what if fault else ""
        if what == "reset" or self.away:
            _reset(request.transport)
            return web.Response()  # aiohttp finds nobody to send it to
        kind, data = "application/json", b""
        if what in ("503", "504"):
            kind, data = "text/html", PROXY_PAGE % int(what)
        elif what in ("408", "500"):
            answer = {"msg": "Ordered fault"}
        status = int(what) if what in INSTEAD else status
        data = data or json.dumps(answer).encode()
        self.statuses[status] += 1
        if fault and what in ("slow", "cut"):
            return await _in_halves(request, status, data, fault)
        return web.Response(status=status, body=data, content_type=kind)

    # -- orders from another process

    async def _control(self, request: web.BaseRequest) -> web.Response:
        if request.method == "POST":
            try:
                await self._obey(await request.json(), request.transport)
            except (ValueError, TypeError) as error:
                return web.json_response({"msg": str(error)}, status=400)
        report = {
            "requests": self.requests,
            "total": self.requests.total(),
            "statuses": self.statuses,
            "queues": {name: queue.size for name, queue in self.queues.items()},
            "connections": self.connections,
            "peak_connections": self.peak_connections,
            "latency": self.latency,
            "away": self.away,
            "rules": asdict(self.rules),
            "faults": [asdict(fault) for fault in self.faults.ordered],
        }
        return web.json_response(report)

    async def _obey(self, order: Json, spare: asyncio.Transport | None) -> None:
        faults = [Fault(**fault) for fault in order.get("faults", [])]
        rules = asdict(self.rules) | order.get("rules", {})
        known = {"clear", "faults", "latency", "expire_leases", "rules", "away", "away_s"}
        if unknown := order.keys() - known | rules.keys() - asdict(self.rules).keys():
            raise ValueError(f"unknown: {sorted(unknown)}")
        if order.get("away") not in (None, *get_args(Away)):
            raise ValueError('away is "reset", "closed" or null')
        if order.get("away") == "closed" and "away_s" not in order:
            raise ValueError("closed needs away_s, or nobody could end it")
        if order.get("clear"):
            self.faults.clear()
        self.faults.ordered += faults
        for name, value in rules.items():
            setattr(self.rules, name, value)
        self.latency = order.get("latency", self.latency)
        if order.get("expire_leases"):
            self.expire_leases()
        if order.get("away"):
            await self.leave(order["away"], order.get("away_s"), spare)
        elif "away" in order:
            await self.come_back()


class _Server(web.Server):
    """Remembers how many connections were open at once."""

    peak = 0

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self.peak = max(self.peak, len(self._connections))


def _nothing_here() -> Json:
    raise Refused(404, "Not found")


def _reset(transport: asyncio.Transport | None) -> None:
    """Close so that the peer sees a reset, not an end: with a linger of 0 the kernel sends RST."""
    if transport is not None:
        sock: socket.socket = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()


async def _in_halves(
    request: web.BaseRequest, status: int, data: bytes, fault: Fault
) -> web.StreamResponse:
    response = web.StreamResponse(status=status, headers={"Content-Type": "application/json"})
    response.content_length = len(data)
    with contextlib.suppress(ConnectionError):  # the client gave up
        await response.prepare(request)
        await response.write(data[: len(data) // 2])
        if fault.what == "cut":
            await asyncio.sleep(0)
            _reset(request.transport)
        else:
            await asyncio.sleep(fault.seconds)
            await response.write(data[len(data) // 2 :])
            await response.write_eof()
    return response


async def _serve(options: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    rules = Rules(max_bytes=options.max_bytes)
    mq = IronMQ(port=options.port, latency=options.latency, seed=options.seed, rules=rules)
    async with mq:
        line = {"url": mq.url, "project_id": mq.project_id, "token": mq.token}
        print(json.dumps(line), flush=True)
        await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.doubles.ironmq", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds added to each answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-bytes", type=int, default=Rules().max_bytes)
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
