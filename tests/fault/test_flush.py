"""What is answered 200 was flushed before: seen from outside, by strace.

SIGKILL does not test the flush, for the page cache survives it.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from tests.fault.driver import event
from tests.service import Service, until

MakeService = Callable[..., Service]
POSTS = 20
_CALLS = "read,recvfrom,recvmsg,write,writev,sendto,sendmsg,fsync,fdatasync"
# thread, then the call or what was interrupted of it; with -y the descriptor's file stands in <>
_LINE = re.compile(r"(?P<thread>\d+) +(?:<\.\.\. )?(?P<call>\w+)(?P<rest>.*)")


@asynccontextmanager
async def traced(service: Service, output: Path) -> AsyncIterator[None]:
    """strace on all threads of a service; its lines go to a file."""
    strace = shutil.which("strace")
    assert strace, "strace is missing, and without it no flush can be seen: apt install strace"
    process = await asyncio.create_subprocess_exec(
        strace, "-f", "-y", "-s", "16", "-e", f"trace={_CALLS}", "-o", str(output),
        "-p", str(service.pid), stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    attached = (await asyncio.wait_for(process.stderr.readline(), 20)).decode()
    assert "attached" in attached, f"strace can't attach to the service: {attached}"
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.communicate(), 20)


def unflushed(trace: str) -> tuple[int, int]:
    """Answers of 200 in the trace, and those before which no flush began and ended.

    One POST is answered before the next is sent, so what lies between the arrival of a POST and
    its answer belongs to it.
    """
    answers = bad = flushes = 0
    flushing: set[str] = set()
    for line in trace.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        thread, call, rest = match["thread"], match["call"], match["rest"]
        if call in ("fsync", "fdatasync"):
            if "/journal/" in rest and "resumed" not in rest:
                flushing.add(thread)
            if thread in flushing and rest.rstrip().endswith("= 0"):
                flushing.discard(thread)
                flushes += 1
        elif '"POST / HTTP' in rest:
            flushes, flushing = 0, set()
        elif '"HTTP/1.1 200' in rest:
            answers += 1
            bad += not flushes
    return answers, bad


async def trace_of_posts(service: Service, folder: Path) -> str:
    """Post one event after the other under strace."""
    await service.start()
    assert (await service.post(event("install", 0)))[0] == 200  # its threads are there now
    output = folder / "strace.txt"
    async with traced(service, output):
        for id in range(1, POSTS + 1):
            assert (await service.post(event("install", id)))[0] == 200

        async def written() -> bool:
            return output.read_text().count('"HTTP/1.1 200') >= POSTS

        await until(written, what="the trace of all answers")
    return output.read_text()


def settings(database: str, *modules: str) -> dict[str, object]:
    names = [f"tests.fault.modules.{name}" for name in ("traceable", *modules)]
    return {"database_url": database, "load_interval": 300, "event_modules": names}


async def test_each_answer_of_200_comes_after_a_flush(
    database: str, make_service: MakeService, tmp_path: Path
) -> None:
    service = make_service(**settings(database))
    trace = await trace_of_posts(service, tmp_path)
    assert unflushed(trace) == (POSTS, 0), trace[-4000:]


async def test_a_journal_that_is_not_flushed_is_noticed(
    database: str, make_service: MakeService, tmp_path: Path
) -> None:
    """The test above can fail."""
    service = make_service(**settings(database, "no_flush"))
    trace = await trace_of_posts(service, tmp_path)
    assert unflushed(trace) == (POSTS, POSTS), trace[-4000:]
