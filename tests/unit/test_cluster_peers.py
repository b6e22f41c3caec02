"""What processes that share a mirror ask each other through its channel."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

from datapipe.monitor.peers import ClusterPeers, Heard, Own
from tests.doubles.channel import Cluster

LIVING = {"a": "web1:10", "b": "web2:11", "c": "web3:12"}


def own(name: str) -> Own:
    async def status(history: bool) -> dict[str, Any]:
        return {"process": name} | ({"history": {}} if history else {})

    async def load(lane: str | None, accept_dead: bool) -> dict[str, Any]:
        return {"process": name, "lane": lane, "accept_dead": accept_dead}

    async def service(status: bool) -> dict[str, Any]:
        return {"pid": 1, "address": None}

    return Own(status, load, service)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def peers(cluster: Cluster, process: str) -> ClusterPeers:
    others = {id: host for id, host in LIVING.items() if id != process}
    return ClusterPeers(cluster.channel(process), lambda: others)


async def test_each_answers_for_itself_and_who_is_silent_is_named_by_its_host(
    cluster: Cluster,
) -> None:
    async with AsyncExitStack() as stack:
        for name in ("a", "c"):
            await stack.enter_async_context(peers(cluster, name).listening(own(name)))
        heard = await peers(cluster, "a").ask("GET", "/status.json", {})
        assert heard == Heard([{"process": "c", "history": {}}], ["web2:11"])
        heard = await peers(cluster, "a").ask("GET", "/status.json", {"history": "no"})
        assert heard == Heard([{"process": "c"}], ["web2:11"])
        heard = await peers(cluster, "b").ask("POST", "/load", {"lane": "x", "accept": "dead"})
        loads = [{"process": name, "lane": "x", "accept_dead": True} for name in ("a", "c")]
        assert heard == Heard(loads, [])
    assert len(cluster.asked) == 3, "who is asked asks nobody"


async def test_all_are_silent_while_the_cluster_is_away(cluster: Cluster) -> None:
    cluster.up = False
    heard = await peers(cluster, "a").ask("GET", "/status.json", {})
    assert heard == Heard((), ["web2:11", "web3:12"])


@pytest.mark.parametrize("answer", [b"", b"[1]", b'{"cut'])
async def test_who_answers_what_is_no_answer_is_silent(cluster: Cluster, answer: bytes) -> None:
    async def how(question: bytes) -> bytes:
        return answer

    await cluster.channel("b").answer(how)
    await cluster.channel("new").answer(how)  # its first heartbeat has not been seen yet
    heard = await peers(cluster, "a").ask("GET", "/status.json", {})
    assert heard == Heard([], ["new", "web2:11", "web3:12"])


@pytest.mark.parametrize(
    "question",
    [b"", b"{}", b"\xff", b'"GET /"', msgspec.json.encode(
        {"method": "GET", "path": "/of_a_newer_version", "query": {}}
    )],
)  # fmt: skip
async def test_a_question_of_another_version_has_no_answer(
    cluster: Cluster, question: bytes
) -> None:
    taken: list[Callable[[bytes], Awaitable[bytes]]] = []

    class Channel:
        async def answer(self, how: Callable[[bytes], Awaitable[bytes]]) -> None:
            taken.append(how)

    async with ClusterPeers(Channel(), dict).listening(own("a")):  # type: ignore[arg-type]
        assert await taken[0](question) == b""
