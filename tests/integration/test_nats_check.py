"""What `datapipe check` says of a NATS cluster, against real servers. It changes nothing there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from datapipe.errors import LaneBlocked, SinkUnavailable
from datapipe.mirrors.nats import check as nats_check
from datapipe.mirrors.nats.check import check_nats
from datapipe.mirrors.nats.pairing import marker_config
from datapipe.mirrors.nats.streams import consumer_config, stream_config
from datapipe.settings import Settings
from datapipe.sinks import Mark
from tests import nats_logins as logins
from tests.jetstream import NatsCluster, request
from tests.ports import free_ports

LANES = ["crash_report", "install", "purchase"]
Findings = list[tuple[str, str]]


def settings_of(cluster: NatsCluster, **more: Any) -> Settings:
    return Settings(**{"nats_url": cluster.urls, "database_url": "postgresql://a/b", **more})


async def findings(
    cluster: NatsCluster, mark: Mark | Exception | None = None, **more: Any
) -> Findings:
    """Args: mark: that the database has, or why that is not known."""
    port = cluster.nodes[0].http_port
    find_mark = mock.AsyncMock(side_effect=[mark])
    found = await check_nats(settings_of(cluster, **more), port, find_mark)
    assert all("\n" not in text for _, text in found)
    return found


def levels(found: Findings) -> set[str]:
    return {level for level, _ in found}


def text_of(found: Findings, level: str, words: str) -> str:
    """The one line of that level that has these words."""
    (text,) = [text for given, text in found if given == level and words in text]
    return text


async def make(cluster: NatsCluster, lane: str, prefix: str, **other: Any) -> None:
    """A lane's stream and consumer, as they should be but for what differs."""
    consumer = consumer_config() | other.pop("consumer", {})
    config = stream_config(settings_of(cluster, nats_prefix=prefix), lane) | other
    async with cluster.client() as client:
        await request(client, f"STREAM.CREATE.{config['name']}", config)
        body = {"stream_name": config["name"], "config": consumer}
        await request(client, f"CONSUMER.CREATE.{config['name']}.load", body)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who gets no answer, or no connection, is told so soon."""
    monkeypatch.setattr(nats_check, "_CONNECT_S", 1.0)
    monkeypatch.setattr(nats_check, "_ANSWER_S", 0.5)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsCluster]:
    """Three hosts, with the monitoring port at the same number on each."""
    hosts = ["127.8.22.1", "127.8.22.2", "127.8.22.3"]
    (port,) = free_ports(hosts[0], 1)
    cluster = NatsCluster(tmp_path_factory.mktemp("three"), hosts=hosts)
    for node in cluster.nodes:
        text = node.file.read_text()
        node.file.write_text(text.replace(f':{node.http_port}"', f':{port}"'))
        node.http_port, node.monitoring_url = port, f"http://{node.host}:{port}"
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.kill()


async def test_a_cluster_as_it_should_be(three: NatsCluster) -> None:
    found = await findings(three)
    assert levels(found) == {"ok"}
    assert re.search(r"version 2\.\d+\.\d+, nodes: 3$", text_of(found, "ok", "nats: reached"))
    for name in ("n0", "n1", "n2"):
        assert "always, 0 of 107374182400 bytes reserved" in text_of(found, "ok", f"node {name}:")
    assert "0 bytes stored, reserved 0 bytes, without a limit" in text_of(found, "ok", "account")
    for lane in LANES:
        assert "first event makes it" in text_of(found, "ok", f"stream datapipe_{lane}:")
    async with three.client() as client:  # nothing has been made
        assert (await request(client, "INFO", {}))["streams"] == 0


async def test_streams_as_they_should_be(nats_node: NatsCluster, nats_prefix: str) -> None:
    for lane in LANES:
        await make(nats_node, lane, nats_prefix)
    await make_marker(nats_node, nats_prefix, "a")
    found = await findings(nats_node, Mark("a"), nats_prefix=nats_prefix, nats_replicas=1)
    assert levels(found) == {"ok"}
    text = text_of(found, "ok", f"stream {nats_prefix}_install:")
    assert "0 messages, 0 of 268435456 bytes, replicas: 1" in text
    assert text_of(found, "ok", f"stream {nats_prefix}: pairs")


async def test_what_differs_is_named(nats_node: NatsCluster, nats_prefix: str) -> None:
    stream = f"{nats_prefix}_install"
    await make(
        nats_node, "install", nats_prefix, discard="old", max_bytes=1_000_000, max_age=10**12,
        subjects=[f"{nats_prefix}.install.>"], retention="limits", duplicate_window=10**9,
        consumer={"ack_wait": 10**9, "max_deliver": 3, "max_ack_pending": 10},
    )  # fmt: skip
    found = await findings(nats_node, nats_prefix=nats_prefix, nats_replicas=3)
    for words in ('discard is "old", not "new"', "max_age is 1000000000000, not 0", "subjects is"):
        assert text_of(found, "fail", words).endswith(f": nats stream edit {stream}")
    assert text_of(found, "fail", 'retention is "limits"').endswith("remove it while it is empty")
    text = text_of(found, "warn", "max_bytes is 1000000, not 268435456")
    assert "nats_lane_max_bytes" in text
    assert text_of(found, "warn", "num_replicas is 1, not 3")
    assert text_of(found, "warn", "duplicate_window is 1000000000")
    edit = f": nats consumer edit {stream} load"
    assert text_of(found, "fail", "max_deliver is 3, not -1").endswith(edit)
    assert text_of(found, "warn", "ack_wait is 1000000000").endswith(edit)
    assert text_of(found, "warn", "max_ack_pending is 10, not -1").endswith(edit)


async def make_marker(cluster: NatsCluster, prefix: str, id: str) -> None:
    async with cluster.client() as client:
        await request(client, f"STREAM.CREATE.{prefix}", marker_config(prefix, id))


async def test_a_database_and_a_cluster_that_are_not_paired_yet(
    nats_node: NatsCluster, nats_prefix: str
) -> None:
    for mark in (None, Mark("a")):
        found = await findings(nats_node, mark, nats_prefix=nats_prefix)
        assert "not there yet" in text_of(found, "ok", f"stream {nats_prefix}:")
    async with nats_node.client() as client:  # nothing has been made
        names = await request(client, "STREAM.NAMES", {"subject": f"{nats_prefix}.>"})
    assert not names["streams"]


@pytest.mark.parametrize(
    ("mark", "there", "words"),
    [
        (Mark("a", confirmed=True), None, "this database belongs to another cluster"),
        (Mark("a", confirmed=True), "b", "this cluster belongs to another database"),
        (Mark("a"), "b", "this cluster belongs to another database"),
        (None, "b", "this cluster belongs to another database"),
    ],
)
async def test_a_database_and_a_cluster_that_do_not_belong_together(
    nats_node: NatsCluster, nats_prefix: str, mark: Mark | None, there: str | None, words: str
) -> None:
    if there:
        await make_marker(nats_node, nats_prefix, there)
    found = await findings(nats_node, mark, nats_prefix=nats_prefix)
    assert text_of(found, "fail", words).startswith("nats: nats_url, database_url: ")
    assert "nats_prefix" in text_of(found, "fail", words)


@pytest.mark.parametrize("error", [SinkUnavailable("away"), LaneBlocked("away")])
async def test_a_database_that_does_not_say_what_it_has(
    nats_node: NatsCluster, nats_prefix: str, error: Exception
) -> None:
    found = await findings(nats_node, error, nats_prefix=nats_prefix)
    assert text_of(found, "away", "whether this is the database's cluster is not seen: away")
    found = await check_nats(settings_of(nats_node, nats_prefix=nats_prefix))  # not asked
    assert f"stream {nats_prefix}:" not in str(found)


async def test_a_stream_of_no_event_type(nats_node: NatsCluster, nats_prefix: str) -> None:
    await make(nats_node, "gone", nats_prefix)
    found = await findings(nats_node, nats_prefix=nats_prefix)
    assert "nothing loads it" in text_of(found, "warn", f"stream {nats_prefix}_gone:")


async def test_a_server_that_keeps_a_while_in_memory(tmp_path: Path) -> None:
    with NatsCluster.running(tmp_path, 1, sync="7s", more="max_payload: 4000") as alone:
        found = await findings(alone, input_max_len=3000)
        assert "sync_interval: always" in text_of(found, "warn", "sync_interval is 7 s")
        assert "input_max_len is 3000" in text_of(found, "warn", "max_payload of the servers is 40")
        silent = await check_nats(settings_of(alone), free_ports("127.0.0.1", 1)[0])
    text = text_of(
        silent, "warn", "sync_interval is known of none of the nodes: nothing answers on"
    )
    assert "curl http://127.0.0.1:" in text
    assert "sync_always" in text


def test_an_older_version() -> None:
    client: Any = SimpleNamespace(version="2.14.6")
    found = list(nats_check._reached(client, {}, None))
    assert text_of(found, "ok", "version 2.14.6")
    assert "slow" in text_of(found, "warn", "version 2.14.6: before 2.15")
    varz = {name: {"version": f"2.{name[1:]}.0"} for name in ("n14", "n15", "n16")}
    found = list(nats_check._reached(SimpleNamespace(version="2.15.0"), varz, 3))  # type: ignore[arg-type]
    assert text_of(found, "warn", "node n14:")


@pytest.mark.usefixtures("quick")
async def test_away_or_not_let_in(tmp_path: Path) -> None:
    (port,) = free_ports("127.0.0.1", 1)
    login = logins.password("u", "s3cret")
    away = Settings(nats_url=f"nats://u:s3cret@127.0.0.1:{port}")
    ((level, text),) = await check_nats(away)
    assert (level, "s3cret" in text) == ("away", False)
    assert text.startswith("nats: no server of nats_url can be used: Connect call failed")
    with NatsCluster.running(tmp_path, 1, more=login.more) as alone:
        for wrong in ({"nats_user": "u", "nats_password": "other"}, {}):
            ((level, text),) = await findings(alone, **wrong)
            assert level == "fail"
            assert "Authorization Violation" in text
    with NatsCluster.running(tmp_path / "plain", 1) as alone:
        ((level, text),) = await findings(alone, nats_url=alone.urls.replace("nats:", "tls:"))
        assert (level, "TLS is required" in text) == ("fail", True)


LITTLE = """
publish: { allow: [
    "$JS.API.STREAM.INFO.*", "$JS.API.CONSUMER.INFO.*.*", "$JS.API.CONSUMER.MSG.NEXT.*.*"
] }
"""


@pytest.mark.usefixtures("quick")
async def test_what_must_be_made_by_hand(tmp_path: Path) -> None:
    """What is printed makes streams and consumers, after which nothing but rights is missing."""
    both = logins.passwords({"u": ("s3cret", LITTLE), "root": ("admin", "")})
    with NatsCluster.running(tmp_path, 1, more=both) as alone:
        login = {"nats_user": "u", "nats_password": "s3cret", "nats_replicas": 1}
        found = await findings(alone, **login)
        missing = text_of(found, "fail", "stream datapipe_install: not there")
        assert "right to publish to $JS.API.STREAM.CREATE.datapipe_install is missing" in missing
        for call in ("INFO", "STREAM.NAMES"):
            assert text_of(found, "warn", f"the right to publish to $JS.API.{call} is missing")
        files = {}
        async with alone.client(user="root", password="admin") as client:
            for line in [text for _, text in found if text.startswith("  ")]:
                if (words := shlex.split(line))[0] == "echo":
                    files[words[3]] = json.loads(words[1])
                elif words[1] == "stream":
                    assert words[:4] == ["nats", "stream", "add", "--config"]
                    config = files[words[4]]
                    await request(client, f"STREAM.CREATE.{config['name']}", config)
                else:
                    assert words[:3] == ["nats", "consumer", "add"]
                    body = {"stream_name": words[3], "config": files[words[5]]}
                    await request(client, f"CONSUMER.CREATE.{words[3]}.load", body)
        assert len(files) == 2 * len(LANES)
        found = await findings(alone, **login)
        assert levels(found) == {"ok", "warn"}
        text = text_of(found, "warn", "stream datapipe: not there, and the right to publish to")
        assert text.endswith("once the service has run, `check` says how to make it")
        found = await findings(alone, Mark("m"), **login)
        assert text_of(found, "warn", "stream datapipe: not there").endswith("by hand:")
        echo, add = [text for level, text in found if text.startswith("  ")]
        config = json.loads(shlex.split(echo)[1])
        assert add == "  nats stream add --config datapipe.json"
        async with alone.client(user="root", password="admin") as client:
            await request(client, "STREAM.CREATE.datapipe", config)
        assert text_of(await findings(alone, Mark("m"), **login), "ok", "stream datapipe: pairs")
        async with alone.client(user="root", password="admin") as client:
            await request(client, "CONSUMER.DELETE.datapipe_install.load", {})
        found = await findings(alone, **login)
        assert text_of(found, "fail", "consumer datapipe_install load: not there")
        assert text_of(found, "fail", "  nats consumer add datapipe_install --config")
