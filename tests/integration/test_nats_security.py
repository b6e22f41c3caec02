"""Services on NATS: what they may do there, how they log in, and that nobody sees the secrets."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datapipe.errors import ConfigError
from datapipe.mirrors import open_mirror
from datapipe.mirrors.nats.client import Client
from datapipe.mirrors.nats.streams import consumer_config, stream_config
from datapipe.settings import Settings
from tests import nats_logins as logins
from tests.commands import command
from tests.jetstream import NatsCluster, request
from tests.ports import free_ports
from tests.postgres import Postgres
from tests.service import ROOT, Service, until
from tests.wire import crash

Make = Callable[..., Service]


async def check(service: Service) -> tuple[int, str]:
    """`datapipe check` with the settings of a service: the exit code, and all that it prints."""
    service.file.write_text(json.dumps(service.settings))
    return await command(service.file, "check")


async def everything_shown(service: Service) -> str:
    """All that a running service tells: pages, status, metrics, its log so far."""
    shown = []
    for path in ("/", "/status.json", "/metrics", "/readyz"):
        async with service.session.get(f"{service.url}{path}") as response:
            shown.append(await response.text())
    return "\n".join([*shown, *service.raw])


def nobody_sees(secrets: list[str], text: str) -> None:
    for secret in secrets:
        assert secret not in text


async def loads(service: Service, postgres: Postgres, database: str) -> None:
    """What it accepts comes into the table."""

    async def accepts() -> bool:
        return (await service.post(crash("a")))[0] == 200

    await until(accepts, what="a POST that is accepted")
    await service.drained()
    assert postgres.execute(database, "SELECT message FROM crash_report") == [("a",)]


# --- logging in ---


@pytest.mark.parametrize("way", ["password", "token", "nkey", "creds"])
@pytest.mark.parametrize("verify", [False, True], ids=["tls", "tls and client certificate"])
async def test_ways_to_log_in(
    make_service: Make, database: str, postgres: Postgres, tmp_path: Path, way: str, verify: bool
) -> None:
    authority = logins.Authority(tmp_path)
    login = {
        "password": lambda: logins.password("u", "s3cr3t-w0rd"),
        "token": lambda: logins.token("s3cr3t-t0ken"),
        "nkey": lambda: logins.nkey(tmp_path),
        "creds": lambda: logins.creds(tmp_path),
    }[way]()
    tls = authority.server(verify=verify)
    with NatsCluster.running(tmp_path / "nats", 1, tls=tls, more=login.more) as nats:
        trust = authority.client() if verify else authority.trusted
        url = logins.with_login(nats.urls, "s3cr3t-t0ken") if way == "token" else nats.urls
        settings = {"nats_url": url, **login.settings, **trust, "database_url": database}
        service = await make_service(mirror="nats", log_level="debug", **settings).start()
        await loads(service, postgres, database)
        nobody_sees(login.secrets, await everything_shown(service))
        code, text = await check(service)
        assert code == 0, text
        nobody_sees(login.secrets, text)
        await service.stop()
        nobody_sees(login.secrets, "\n".join(service.raw))


@pytest.mark.parametrize("way", ["password", "password in the URL", "token", "nkey", "creds"])
async def test_a_wrong_login_shows_no_secret(
    make_service: Make, database: str, tmp_path: Path, way: str
) -> None:
    (tmp_path / "other").mkdir()
    right = {"nkey": logins.nkey, "creds": logins.creds}.get(way)
    login = right(tmp_path) if right else logins.password("u", "right")
    wrong = right(tmp_path / "other") if right else logins.password("u", "s3cr3t-w0rd")
    with NatsCluster.running(tmp_path / "nats", 1, more=login.more) as nats:
        urls = {
            "password in the URL": logins.with_login(nats.urls, "u:s3cr3t-w0rd"),
            "token": logins.with_login(nats.urls, "s3cr3t-w0rd"),
        }
        given = (
            {"nats_url": urls[way]} if way in urls else {"nats_url": nats.urls, **wrong.settings}
        )
        service = make_service(
            mirror="nats", log_level="debug", database_url=database, mirror_timeout=1, **given
        )
        await refused(service, wrong.secrets, "Authorization Violation")


async def refused(service: Service, secrets: list[str], words: str) -> None:
    """It answers 503, the page and `check` say why, and no secret is seen."""
    service.settings["event_modules"] = ["tests.fault.modules.quick_check"]
    await service.start()
    status, answer = await service.post(crash())
    assert status == 503, answer

    async def told() -> bool:
        return words in str((await service.status())["mirror"]["error"])

    await until(told, what="the reason on the page")
    nobody_sees(secrets, f"{answer}{await everything_shown(service)}")
    code, text = await check(service)
    assert code == 1
    assert words in text
    nobody_sees(secrets, text)
    await service.stop()
    nobody_sees(secrets, "\n".join(service.raw))
    assert any(line.get("level") == "debug" for line in service.lines)


async def test_a_server_that_is_away_shows_no_secret(make_service: Make, database: str) -> None:
    (port,) = free_ports("127.0.0.1", 1)
    url = f"nats://u:s3cr3t-w0rd@127.0.0.1:{port},nats://s3cr3t-t0ken@127.0.0.1:{port}"
    service = make_service(
        mirror="nats", log_level="debug", database_url=database, mirror_timeout=1, nats_url=url
    )
    await refused(service, ["s3cr3t"], "Connect")  # what follows is the event loop's


@pytest.mark.parametrize("key", ["nats_creds", "nats_nkey_file"])
async def test_a_file_that_is_none_shows_nothing_of_it(
    make_service: Make, database: str, tmp_path: Path, key: str
) -> None:
    """nats-py would look for a JWT in it for ever."""
    (tmp_path / "file").write_text("SUs3cr3t\n")
    with NatsCluster.running(tmp_path / "nats", 1) as nats:
        given = {"nats_url": nats.urls, key: str(tmp_path / "file")}
        service = make_service(
            mirror="nats", log_level="debug", database_url=database, mirror_timeout=1, **given
        )
        await refused(service, ["s3cr3t"], "can't log in")


@pytest.mark.parametrize("key", ["nats_ca_file", "nats_cert_file"])
async def test_what_is_no_certificate_is_one_clear_line(tmp_path: Path, key: str) -> None:
    (file := tmp_path / "file").write_text("s3cr3t")
    more = {key: str(file)} | ({"nats_key_file": str(file)} if key == "nats_cert_file" else {})
    with pytest.raises(ConfigError, match=f"^{key}.* must hold .*, in PEM$"):
        async with open_mirror(
            Settings(nats_url="nats://a", database_url="postgresql://a/b", **more), "p"
        ):
            pass


async def test_no_login_goes_to_a_server_without_tls(tmp_path: Path) -> None:
    """Where TLS is wanted: by tls://, or by the authority to trust."""
    heard: list[bytes] = []

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = {"server_id": "x", "version": "2.15.0", "auth_required": True, "headers": True}
        writer.write(f"INFO {json.dumps(info | {'max_payload': 1048576})}\r\n".encode())
        heard.append(await reader.read(4096))
        writer.close()

    authority = logins.Authority(tmp_path)
    listening = await asyncio.start_server(server, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    for scheme, trust in (("tls", {}), ("nats", authority.trusted)):
        heard.clear()
        settings = Settings(nats_url=f"{scheme}://u:s3cr3t@127.0.0.1:{port}", **trust)
        client = Client(settings)
        async with client.connecting():

            async def told(client: Client = client) -> bool:
                return "TLS is required" in str(client.refused)

            await until(told, 10)
        assert b"".join(heard) == b""
    listening.close()


async def test_a_certificate_that_is_replaced_lets_it_in(tmp_path: Path) -> None:
    """After a handshake that failed it is tried again."""
    (tmp_path / "other").mkdir()
    ours, other = logins.Authority(tmp_path), logins.Authority(tmp_path / "other")
    nats = NatsCluster(tmp_path / "nats", 1, tls=other.server())
    try:
        nats.start()
        client = Client(Settings(nats_url=nats.urls, **ours.trusted))
        async with client.connecting():

            async def told() -> bool:
                return "certificate verify failed" in str(client.refused)

            await until(told, 10)
            await asyncio.to_thread(nats.kill)
            (node,) = nats.nodes
            node.file.write_text(node.file.read_text().replace(f"{tmp_path}/other", str(tmp_path)))
            await asyncio.to_thread(nats.start)
            await client.wait_connected(20)
    finally:
        nats.kill()


# --- rights ---


def permissions(folder: Path, prefix: str) -> tuple[str, list[dict[str, str]]]:
    """The shipped example with keys of ours, and the settings of its users."""
    text = (ROOT / "deploy" / "nats-permissions.conf").read_text()
    settings = []
    for number, public in enumerate(re.findall(r"nkey: (U\w+)", text)):
        key = logins.Key(logins.USER)
        (file := folder / f"{number}.nk").write_text(key.seed)
        text = text.replace(public, key.public)
        settings.append({"nats_nkey_file": str(file), "nats_prefix": prefix})
    return text.replace('"datapipe.', f'"{prefix}.'), settings


@pytest.mark.parametrize("create", [True, False])
async def test_the_example_of_rights_is_enough(
    make_service: Make, database: str, postgres: Postgres, tmp_path: Path, create: bool
) -> None:
    text, users = permissions(tmp_path, "datapipe")
    root = logins.Key(logins.USER)
    (tmp_path / "root.nk").write_text(root.seed)
    text = text.replace("users: [", f"users: [ {{ nkey: {root.public} }}")
    with NatsCluster.running(tmp_path / "nats", 1, more=text) as nats:
        settings: dict[str, Any] = {
            "mirror": "nats", "nats_url": nats.urls, "database_url": database, "nats_replicas": 1,
            **users[0 if create else 1],
        }  # fmt: skip
        if not create:
            async with nats.client(nkeys_seed=str(tmp_path / "root.nk")) as client:
                for lane in ("crash_report", "install", "purchase"):
                    config = stream_config(Settings(**settings), lane)
                    await request(client, f"STREAM.CREATE.{config['name']}", config)
                    body = {"stream_name": config["name"], "config": consumer_config()}
                    await request(client, f"CONSUMER.CREATE.{config['name']}.load", body)
        service = make_service(**settings)
        code, told = await check(service)
        assert code == 0, told
        assert ("first event makes it" in told) == create
        assert ("the service pairs the cluster" in told) == create
        assert ("are not kept out" in told) == (not create)
        assert "account DATAPIPE" not in told
        await service.start()
        other = await make_service(**settings).start()
        await loads(service, postgres, database)

        async def both() -> bool:
            return (await service.status())["processes"] == 2

        await until(both, 60, "both processes on the page")
        assert (await service.load())["failed"] == {}
        log = nats.nodes[0].log_file.read_text()
        denied = set(re.findall(r'Violation - Subject "([^"]+)"', log))
        assert denied == (set() if create else {"$JS.API.STREAM.CREATE.datapipe"})
        code, told = await check(service)
        assert (code, "stream datapipe: pairs" in told) == (0, create), told
        assert len(service.logged("cluster and database not paired")) == (not create)
        await other.stop()
        await service.stop()
