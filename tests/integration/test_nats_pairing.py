"""One cluster and one database belong together: who finds another one refuses to start."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from unittest import mock

import pytest
import structlog.testing

from datapipe.errors import ConfigError, LaneBlocked, MirrorUnavailable, SinkUnavailable
from datapipe.mirrors.nats import pairing
from datapipe.mirrors.nats.mirror import Nats, open_nats
from datapipe.mirrors.nats.pairing import marker_config
from datapipe.sinks import Mark
from tests import nats_logins as logins
from tests.jetstream import NatsCluster, request
from tests.mirror_nats import Members, opened, segment, settings_of, store, take_until
from tests.postgres import Postgres
from tests.service import Service, until
from tests.wire import crash

OURS, CONFIRMED = Mark("ours"), Mark("ours", confirmed=True)


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    with mock.patch.object(pairing, "_AGAIN_S", 0.05):
        yield


def members(mark: Mark | None) -> Members:
    made = Members()
    made.found = mark
    return made


async def put_marker(cluster: NatsCluster, prefix: str, id: str) -> None:
    async with cluster.client() as client:
        await request(client, f"STREAM.CREATE.{prefix}", marker_config(prefix, id))


async def delete_marker(cluster: NatsCluster, prefix: str) -> None:
    async with cluster.client() as client:
        await request(client, f"STREAM.DELETE.{prefix}", {})


async def marker(cluster: NatsCluster, prefix: str) -> dict[str, Any] | None:
    """The marker's configuration, if there is one."""
    async with cluster.client() as client:
        names = (await request(client, "STREAM.NAMES", {"subject": f"{prefix}.mark"}))["streams"]
        if not names:
            return None
        assert names == [prefix]
        config: dict[str, Any] = (await request(client, f"STREAM.INFO.{prefix}", {}))["config"]
        return config


async def id_there(cluster: NatsCluster, prefix: str) -> str | None:
    config = await marker(cluster, prefix)
    return None if config is None else config["metadata"]["datapipe_database"]


@pytest.mark.parametrize("there", [None, "ours", "another's"])
@pytest.mark.parametrize("mark", [None, OURS, CONFIRMED], ids=["none", "pending", "confirmed"])
async def test_what_is_paired_and_what_is_refused(
    cluster: NatsCluster, prefix: str, mark: Mark | None, there: str | None
) -> None:
    if there:
        await put_marker(cluster, prefix, there)
    database = members(mark)
    async with open_nats(settings_of(cluster, prefix), "one") as mirror:
        with pytest.raises(MirrorUnavailable, match="not known yet"):
            await mirror.take("install", 1000)
        await store(mirror, segment(1))  # accepted all the same
        if (mark, there) in [(None, None), (OURS, None), (OURS, "ours"), (CONFIRMED, "ours")]:
            await mirror.recover(database)
            assert database.found is not None
            assert database.found.confirmed
            assert await id_there(cluster, prefix) == database.found.id
            assert mark is None or database.found.id == mark.id
            assert not await mirror.keep(database)
            assert len(await take_until(mirror, 1)) == 1
        else:
            remedy = f"'cluster:{prefix}'" if there is None else f"delete the stream {prefix}$"
            with pytest.raises(ConfigError, match=f"nats_url, database_url: .*{remedy}"):
                await mirror.recover(database)
            with pytest.raises(MirrorUnavailable, match="not known yet"):
                await mirror.take("install", 1000)
            assert await mirror.keep(database)
            assert (database.found, await id_there(cluster, prefix)) == (mark, there)


async def test_the_marker_holds_nothing_and_is_no_lane(cluster: NatsCluster, prefix: str) -> None:
    async with opened(cluster, prefix) as mirror:
        await store(mirror, segment(1))
        config = await marker(cluster, prefix)
        lane = await _config(cluster, f"{prefix}_install")
        assert config is not None
        assert config["num_replicas"] == lane["num_replicas"] == len(cluster.nodes)
        assert (config["storage"], config["max_bytes"], config["max_msgs"]) == ("file", 1024, 1)
        assert "datapipe_database" not in lane.get("metadata", {})
        assert (await mirror.recover(Members())).unregistered == set()
        assert set(mirror.streams.by_lane) == {"install"}


async def _config(cluster: NatsCluster, stream: str) -> dict[str, Any]:
    async with cluster.client() as client:
        config: dict[str, Any] = (await request(client, f"STREAM.INFO.{stream}", {}))["config"]
        return config


class Several(Members):
    """One database that several see; others come in between whatever is asked of it."""

    async def find_mark(self, prefix: str) -> Mark | None:
        await asyncio.sleep(0.002)
        found = await super().find_mark(prefix)
        await asyncio.sleep(0.002)
        return found

    async def mark(self, prefix: str) -> Mark:
        await asyncio.sleep(0.002)
        found = await super().mark(prefix)
        await asyncio.sleep(0.002)
        return found


async def looks(cluster: NatsCluster, prefix: str, databases: list[Members]) -> list[Any]:
    """What becomes of a process for each, all at once, over a connection of its own."""
    connected = asyncio.Barrier(len(databases))

    async def one(number: int, database: Members) -> None:
        async with open_nats(settings_of(cluster, prefix), f"process{number}") as mirror:
            await mirror.streams.find()  # it is connected
            await connected.wait()
            await asyncio.sleep(number * 0.001)
            while await mirror.keep(database):
                with suppress(MirrorUnavailable):  # somebody else is just making the marker
                    await mirror.recover(database)

    started = [one(number, database) for number, database in enumerate(databases)]
    return await asyncio.gather(*started, return_exceptions=True)


@pytest.mark.parametrize("attempt", range(3))
async def test_processes_that_start_at_once_agree(
    cluster: NatsCluster, prefix: str, attempt: int
) -> None:
    database = Several(None)
    assert await looks(cluster, prefix, [database] * 8) == [None] * 8
    assert database.found == Mark(await id_there(cluster, prefix) or "", confirmed=True)


@pytest.mark.parametrize("attempt", range(3))
async def test_of_databases_that_come_at_once_one_is_paired(
    cluster: NatsCluster, prefix: str, attempt: int
) -> None:
    databases: list[Members] = [Several(None) for _ in range(6)]
    outcomes = await looks(cluster, prefix, databases)
    won = [each for each in databases if each.found and each.found.confirmed]
    assert [each.found and each.found.id for each in won] == [await id_there(cluster, prefix)]
    assert outcomes.count(None) == 1
    assert sum(isinstance(each, ConfigError) for each in outcomes) == 5


async def test_another_one_that_pairs_them_while_we_look(cluster: NatsCluster, prefix: str) -> None:
    """Whatever we ask first is not true any more once we ask the second."""
    database = Members(None)
    async with (
        open_nats(settings_of(cluster, prefix), "one") as mirror,
        open_nats(settings_of(cluster, prefix), "two") as other,
    ):
        marker, find_mark = mirror._pairing._marker, database.find_mark
        asked: list[str] = []

        async def once_asked(what: str) -> None:
            asked.append(what)
            if len(asked) == 1:
                with mock.patch.object(database, "find_mark", find_mark):
                    await other.recover(database)

        async def ask_marker() -> str | None:
            found = await marker()
            await once_asked("the cluster")
            return found

        async def ask_ledger(prefix: str) -> Mark | None:
            found = await find_mark(prefix)
            await once_asked("the database")
            return found

        with mock.patch.object(mirror._pairing, "_marker", ask_marker), \
                mock.patch.object(database, "find_mark", ask_ledger):  # fmt: skip
            await mirror.recover(database)
        assert not await mirror.keep(database)
        assert len(asked) > 1
    assert database.found == Mark(await id_there(cluster, prefix) or "", confirmed=True)


class Dies(Members):
    """Its connection breaks before or after something is written."""

    def __init__(self, where: str) -> None:
        super().__init__(None)
        self.where = where

    def at(self, where: str) -> None:
        if self.where == where:
            raise SinkUnavailable("away")

    async def mark(self, prefix: str) -> Mark:
        self.at("before the mark")
        found = await super().mark(prefix)
        self.at("after the mark")
        return found

    async def confirm_mark(self, prefix: str, id: str) -> None:
        self.at("before it is confirmed")
        await super().confirm_mark(prefix, id)
        self.at("after it is confirmed")


@pytest.mark.parametrize(
    "where", ["before the mark", "after the mark", "before it is confirmed",
              "after it is confirmed", "after the marker"],
)  # fmt: skip
async def test_whatever_dies_in_between_the_next_one_goes_on(
    nats_node: NatsCluster, nats_prefix: str, where: str
) -> None:
    database = Dies(where)
    async with open_nats(settings_of(nats_node, nats_prefix), "one") as mirror:
        create = mirror.streams.create

        async def answer_is_lost(config: dict[str, Any], timeout_s: float) -> dict[str, Any]:
            made = await create(config, timeout_s)
            if where == "after the marker":
                raise MirrorUnavailable("no answer")
            return made

        with mock.patch.object(mirror.streams, "create", answer_is_lost):
            if where == "after the marker":
                with pytest.raises(MirrorUnavailable):
                    await mirror.recover(database)
            else:
                await mirror.recover(database)
        assert await mirror.keep(database)  # recover again before long
        with pytest.raises(MirrorUnavailable):
            await mirror.take("install", 1000)
    database.where = ""
    async with open_nats(settings_of(nats_node, nats_prefix), "two") as mirror:
        await mirror.recover(database)
        assert not await mirror.keep(database)
    assert database.found == Mark(await id_there(nats_node, nats_prefix) or "", confirmed=True)


async def test_a_marker_that_can_not_be_seen_holds_up_the_start_alone(
    nats_node: NatsCluster, nats_prefix: str
) -> None:
    database = Members()
    unseen = mock.AsyncMock(side_effect=MirrorUnavailable("no leader"))
    async with open_nats(settings_of(nats_node, nats_prefix), "one") as mirror:
        await store(mirror, segment(1), segment(2))
        with mock.patch.object(mirror._pairing, "_marker", unseen):
            with pytest.raises(MirrorUnavailable, match="no leader"):
                await mirror.recover(database)
            with pytest.raises(MirrorUnavailable, match="not known yet"):
                await mirror.take("install", 1000)
            assert await mirror.keep(database)
        await mirror.recover(database)
        with mock.patch.object(mirror._pairing, "_marker", unseen):
            await mirror.recover(database)
            assert not await mirror.keep(database)
            assert len(await take_until(mirror, 2)) == 2


@pytest.mark.parametrize("error", [SinkUnavailable, LaneBlocked])
async def test_while_the_database_is_away_nothing_is_taken_or_forgotten(
    nats_node: NatsCluster, nats_prefix: str, error: Callable[[str], Exception]
) -> None:
    database = Members()
    async with open_nats(settings_of(nats_node, nats_prefix), "one") as mirror:
        away = mock.AsyncMock(side_effect=error("away"))
        pruned = mock.AsyncMock()
        with mock.patch.object(database, "find_mark", away), \
                mock.patch.object(mirror, "_prune", pruned):  # fmt: skip
            await mirror.recover(database)
        pruned.assert_not_awaited()
        assert await mirror.keep(database)
        await store(mirror, segment(1))
        with pytest.raises(MirrorUnavailable, match="not known yet"):
            await mirror.take("install", 1000)
        assert await marker(nats_node, nats_prefix) is None
        await mirror.recover(database)
        assert len(await take_until(mirror, 1)) == 1


@pytest.mark.parametrize("now", [None, "another's"])
async def test_what_changes_later_is_refused_as_well(
    nats_node: NatsCluster, nats_prefix: str, now: str | None
) -> None:
    database = Members()
    async with open_nats(settings_of(nats_node, nats_prefix), "one") as mirror:
        await mirror.recover(database)
        await delete_marker(nats_node, nats_prefix)
        if now:
            await put_marker(nats_node, nats_prefix, now)
        with pytest.raises(ConfigError):
            await mirror.recover(database)
        with pytest.raises(MirrorUnavailable):
            await mirror.take("install", 1000)


async def test_a_marker_that_a_new_leader_does_not_know_yet_is_looked_for_again(
    nats_node: NatsCluster, nats_prefix: str
) -> None:
    database = members(CONFIRMED)
    await put_marker(nats_node, nats_prefix, "ours")
    first = time.monotonic()

    async def seen_later() -> str | None:
        return "ours" if time.monotonic() - first > 0.04 else None

    async with open_nats(settings_of(nats_node, nats_prefix), "one") as mirror:
        with mock.patch.object(mirror._pairing, "_marker", seen_later), \
                mock.patch.object(mirror.streams, "find", mock.AsyncMock()):  # fmt: skip
            first = time.monotonic()
            await mirror.recover(database)


async def test_a_stream_of_that_name_that_is_no_marker_is_refused(
    nats_node: NatsCluster, nats_prefix: str
) -> None:
    async with nats_node.client() as client:
        body = {"name": nats_prefix, "subjects": [f"{nats_prefix}.mark"]}
        await request(client, f"STREAM.CREATE.{nats_prefix}", body)
    async with open_nats(settings_of(nats_node, nats_prefix), "one") as mirror:
        with pytest.raises(ConfigError):
            await mirror.recover(members(OURS))


async def warnings_of(mirror: Nats, database: Members) -> list[str]:
    """What is logged while it looks twice."""
    with structlog.testing.capture_logs() as lines:
        await mirror.recover(database)
        await mirror.recover(database)
    return [line["event"] for line in lines if line["log_level"] == "warning"]


async def test_without_the_right_to_make_it_the_service_goes_on(own_nats_rights: Any) -> None:
    cluster, login = own_nats_rights
    database = Members(None)
    async with open_nats(settings_of(cluster, "p", **login), "one") as mirror:
        assert await warnings_of(mirror, database) == ["cluster and database not paired"]
        assert not await mirror.keep(database)
        assert database.found is not None
        assert not database.found.confirmed
        async with cluster.client(user="root", password="admin") as client:
            await request(client, "STREAM.CREATE.p", marker_config("p", database.found.id))
        assert await warnings_of(mirror, database) == []
        assert database.found.confirmed


@pytest.fixture
def own_nats_rights(tmp_path: Any) -> Iterator[tuple[NatsCluster, dict[str, str]]]:
    """A server, and the login of one who may make no streams."""
    little = 'publish: { allow: ["$JS.API.STREAM.INFO.*", "$JS.API.STREAM.NAMES"] }'
    users = logins.passwords({"u": ("s3cret", little), "root": ("admin", "")})
    with NatsCluster.running(tmp_path, 1, more=users) as alone:
        yield alone, {"nats_user": "u", "nats_password": "s3cret"}


async def test_a_service_ends_whose_cluster_was_made_anew(
    make_service: Callable[..., Service],
    nats_node: NatsCluster,
    nats_prefix: str,
    database: str,
    postgres: Postgres,
) -> None:
    settings = {**nats_node.settings, "nats_prefix": nats_prefix, "database_url": database}
    service = await make_service(**settings).start()
    await service.post(crash("a"))
    await service.drained()
    assert await service.stop() == 0
    found = "SELECT body, events FROM datapipe_ledger WHERE kind = 'cluster'"
    assert postgres.execute(database, found) == [(await id_there(nats_node, nats_prefix), 1)]
    await nats_node.delete_streams(nats_prefix)

    anew = make_service(**settings)
    await anew.start(wait=False)
    assert await anew.wait() == 1
    (line,) = anew.logged("stopping")
    assert f"'cluster:{nats_prefix}'" in line["error"]
    assert await id_there(nats_node, nats_prefix) is None
    delete = f"DELETE FROM datapipe_ledger WHERE segment = 'cluster:{nats_prefix}'"
    postgres.execute(database, delete)  # as it said
    again = await make_service(**settings).start()

    async def paired() -> bool:
        return await id_there(nats_node, nats_prefix) is not None

    await until(paired)
    assert await again.stop() == 0
