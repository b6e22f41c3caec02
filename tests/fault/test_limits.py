"""Memory and time are bounded whatever clients send and however long the database is away."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from tests.fault.outage import outage, rss_mb
from tests.postgres import Postgres
from tests.service import Service, until
from tests.wire import Wire, ask, crash, get, lines, post, running, wire

MakeService = Callable[..., Service]
MIB = 1 << 20
BODY = 8 * MIB
PING = get("/healthz")
BLOCK_S = 0.2  # no body may hold up the others longer


def packed(data: bytes) -> bytes:
    return gzip.compress(data, 9)


def bodies() -> dict[str, tuple[bytes, tuple[str, ...]]]:
    """What costs the most: bodies of up to 8 MiB, unpacked."""
    good = json.dumps(crash("x" * 60)).encode()
    bad = b'{"event_name": "crash_report", "user_id": "1", "timestamp": [], "message": 1}'
    member = gzip.compress(b"")
    empty_members = member * (2 * MIB // len(member))
    deflated = zlib.compress(b" " * (BODY - 2) + b"{}")
    wide = b'{"event_name": "crash_report", "user_id": 1, "timestamp": 1, "message": "m", '
    return {
        "ones": (b"[" + b"1," * (BODY // 2 - 2) + b"1]", ()),
        "lists": (b"[" + b"[]," * (BODY // 3 - 2) + b"1]", ()),
        "objects": (b"[" + b"{}," * (BODY // 3 - 2) + b"1]", ()),
        "a good event, one of many brackets": (
            b"[" + good + b',{"x": [' + b"{}," * (MIB // 2) + b"1]}]", (),
        ),
        "20,000 bad events": (b"[" + b",".join([bad] * 20_000) + b"]", ()),
        "20,000 bad lines": (b"\n".join([bad] * 20_000), ()),
        "20,000 good events, the last is bad": (b"[" + b",".join([good] * 19_999) + b",1]", ()),
        "20,000 good events": (b"[" + b",".join([good] * 20_000) + b"]", ()),
        "20,000 good events with a key": (
            b"[" + b",".join([good] * 20_000) + b"]", ("Idempotency-Key: k",),
        ),
        "deep": (b"[" * BODY, ()),
        "deep and closed": (b"[" * (BODY // 2) + b"]" * (BODY // 2), ()),
        "deep in an event": (wide + b'"x": ' + b'{"a":' * (MIB) + b"1" + b"}" * MIB + b"}", ()),
        "blank lines": (b"\n" * BODY, ()),
        "blank lines and one event": (b"\n" * (BODY // 2) + good + b"\n" * (BODY // 3), ()),
        "lines of one byte": (b"{\n" * (BODY // 2), ()),
        "spaces": (b" " * BODY, ()),
        "one string": (b'{"event_name": "crash_report", "message": "' + b"x" * (BODY - 100) + b'"}',
                       ()),
        "one string of escapes": (b'"' + b"\\u0041" * (BODY // 6 - 1) + b'"', ()),
        "one number": (b"1" * BODY, ()),
        "one name": (b'{"event_name": "' + b"x" * (BODY - 100) + b'"}', ()),
        "many keys": (
            b"{" + b",".join(b'"k%d": 1' % n for n in range(500_000)) + b"}", (),
        ),
        "no text": (b"\xff" * BODY, ()),
        "no text at the end": (b"[" + b",".join([good] * 19_000) + b"\xff]", ()),
        "a gzip bomb": (packed(b"0" * 50 * MIB), ("Content-Encoding: gzip",)),
        "empty gzip members": (empty_members, ("Content-Encoding: gzip",)),
        "a deflate bomb that fits": (deflated, ("Content-Encoding: deflate",)),
    }  # fmt: skip


@asynccontextmanager
async def pinging(service: Service) -> AsyncIterator[list[float]]:
    """Asks for /healthz on one connection all the time; how long each answer took."""
    took: list[float] = []

    async def ping(line: Wire) -> None:
        while True:
            began = time.perf_counter()
            await line.send(PING)
            await line.answer(method="GET")
            took.append(time.perf_counter() - began)
            await asyncio.sleep(0.002)

    async with wire(service) as line:
        task = asyncio.create_task(ping(line))
        try:
            yield took
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_no_body_blocks_the_others(tmp_path: Path, database: str) -> None:
    """The best of some tries: this machine may be busy with other things, the service is not."""
    slow: dict[str, float] = {}
    async with running(tmp_path, database_url=database, load_interval=0.5) as service:
        for name, (body, headers) in bodies().items():
            request = post(body, *headers)
            best = 9.0
            for turn in range(5):
                async with pinging(service) as took:
                    await some(took, 3)
                    took.clear()
                    answer = await ask(service, request)
                    assert answer.status in (200, 207, 400, 413), (name, answer)
                    await some(took, len(took) + 2)
                best = min(best, max(took))
                if turn and best < BLOCK_S / 2:
                    break
            if best >= BLOCK_S:
                slow[name] = round(best, 3)
            print(f"{name}: {best * 1000:.0f} ms, {answer.status}")
        assert not slow, slow
        assert rss_mb(service.pid, "VmHWM") < 200  # nothing is left behind
        assert not service.logged("fault")


async def test_thousands_of_lanes_hold_up_nobody(tmp_path: Path, database: str) -> None:
    """What is done for each lane of a batch must not look at all lanes; what looks at all of them,
    and can be asked for by anyone, must let others have their turn."""
    names = [f"type_{n}" for n in range(2000)]
    pad = b"x" * 300
    events = [b'{"event_name": "%b", "user_id": 1, "pad": "%b"}' % (n.encode(), pad) for n in names]
    batches = {count: b"[" + b",".join(events * count) + b"]" for count in (1, 10)}
    requests = {
        "an event for each": post(batches[1]),
        "ten events for each": post(batches[10]),
        "ten for each with a key": post(batches[10], "Idempotency-Key: k"),
    }
    looks = {path: get(path) for path in ("/status.json", "/metrics", "/openapi.json", "/")}
    slow: dict[str, float] = {}
    async with running(
        tmp_path, database_url=database, events={name: {"user_id": "int"} for name in names}
    ) as service:
        for name, request in (requests | looks).items():
            held: list[float] = []
            most = BLOCK_S if name not in looks else 2 * BLOCK_S  # a look is no body
            while not held or (held[-1] >= most and len(held) < 5):
                async with pinging(service) as took:
                    await some(took, 3)
                    took.clear()
                    answer = await ask(service, request, method="GET" if name in looks else "POST")
                    assert answer.status == 200, answer
                    await some(took, len(took) + 2)
                held.append(max(took))
            if min(held) >= most:
                slow[name] = round(min(held), 3)
            print(f"{name}: {', '.join(f'{each * 1000:.0f} ms' for each in held)}")
    assert not slow, slow


async def some(took: list[float], count: int) -> None:
    async def there() -> bool:
        return len(took) >= count

    await until(there, what="pings")


async def test_an_outage_leaves_memory_flat(postgres: Postgres, make_service: MakeService) -> None:
    """Some seconds of what `make torture` does for half an hour: much is parked."""
    with Postgres.running() as server:
        found = await outage(
            server, make_service, 4, events_a_second=16000, batch=200,
            buffer_max_bytes=1 * MIB, text="x" * 1900,
        )  # fmt: skip
    assert found.rows == found.distinct == found.posted > 20_000
    assert found.refused == 0
    assert found.rss_end_mb < found.rss_start_mb + 12, found
    assert found.loaded_in_s < 20, found


async def test_slow_clients_are_cut_off_and_hold_little(tmp_path: Path, database: str) -> None:
    """A byte now and then, in the head or in the body, from many at once."""
    async with running(tmp_path, database_url=database, request_timeout=2) as service:
        await service.post(crash())
        before = rss_mb(service.pid)
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8000000\r\n"

        async def dribble(line: Wire, start: bytes) -> None:
            try:
                await line.send(start)
                for _ in itertools.count():
                    await line.send(b"a")
                    await asyncio.sleep(0.2)
            except (ConnectionError, OSError):
                return

        async with asyncio.TaskGroup() as group, _many(service, 200) as connections:
            tasks = [
                group.create_task(dribble(line, (head, head + b"\r\n[")[n % 2]))
                for n, line in enumerate(connections)
            ]
            assert (await service.post(crash()))[0] == 200  # nobody else is held up
            answers = await asyncio.gather(*(line.ended(12) for line in connections))
            assert rss_mb(service.pid) < before + 30
            for task in tasks:
                task.cancel()
        told = [answer for answer in answers if answer]
        assert all(b" 408 " in answer.split(b"\r\n")[0] for answer in told)
        assert len(told) > 150  # a reset may overtake the answer
        assert (await service.post(crash()))[0] == 200


@asynccontextmanager
async def _many(service: Service, count: int) -> AsyncIterator[list[Wire]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(wire(service)) for _ in range(count)]


HEADS = {
    "a huge header": b"POST / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * MIB + b"\r\n\r\n",
    "a huge name": b"POST / HTTP/1.1\r\nHost: localhost\r\n" + b"X" * MIB + b": 1\r\n\r\n",
    "many headers": b"POST / HTTP/1.1\r\nHost: localhost\r\n"
    + b"".join(b"X-%d: 1\r\n" % n for n in range(100_000)) + b"\r\n",
    "a huge target": b"POST /?" + b"x" * MIB + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "headers without end": b"POST / HTTP/1.1\r\n" + b"X: 1\r\n" * 200_000,
    "a huge method": b"P" * MIB + b" / HTTP/1.1\r\n\r\n",
}  # fmt: skip


async def test_heads_are_bounded(tmp_path: Path, database: str) -> None:
    async with running(tmp_path, database_url=database, request_timeout=3) as service:
        await service.post(crash())
        before = rss_mb(service.pid)
        for name, head in HEADS.items():
            for _ in range(10):
                async with wire(service) as line, pinging(service):
                    try:
                        await line.send(head)
                        answer = await line.ended(8)
                    except (ConnectionError, OSError):
                        continue
                    told = answer.partition(b" ")[2][:3]
                    assert told in (b"", b"400", b"408", b"431"), (name, answer[:300])
        assert (await service.post(crash()))[0] == 200
        assert rss_mb(service.pid) < before + 30
        assert not service.logged("fault")


async def test_what_is_under_way_is_bounded(tmp_path: Path, database: str) -> None:
    """Forty clients with 8 MiB each: some are told to come back, memory holds, small ones pass."""
    async with running(tmp_path, database_url=database) as service:
        body = lines(*[crash("x" * 1500)] * 5000)
        tasks = [asyncio.create_task(ask(service, post(body))) for _ in range(40)]
        small = [await service.post(crash()) for _ in range(20)]
        statuses = [(await task).status for task in tasks]
        assert set(statuses) <= {200, 503}, statuses
        assert 200 in statuses
        assert [status for status, _ in small] == [200] * 20
        assert rss_mb(service.pid, "VmHWM") < 350
