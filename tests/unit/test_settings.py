"""Settings: where they come from, and what is told when one is wrong."""

from __future__ import annotations

import json
import math
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from datapipe import settings
from datapipe.cli.main import main
from datapipe.errors import ConfigError
from datapipe.settings import Settings, plugins
from datapipe.sinks import Database, SinkPlugin
from datapipe.sinks.memory import MemoryDatabase

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder is empty: that of the tests may have a `var` of somebody's."""
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")


def load(content: Any = None, tmp: Path | None = None, **env: str) -> Settings:
    if content is not None and tmp is not None:
        file = tmp / "datapipe.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        env["DATAPIPE_CNF"] = str(file)
    return settings.load(environ=env)


def test_the_sample_has_every_key_with_its_default() -> None:
    sample = json.loads((ROOT / "datapipe.json").read_text())
    assert list(sample) == list(Settings.__struct_fields__)
    found = settings.load(environ={"DATAPIPE_CNF": str(ROOT / "datapipe.json")})
    assert found == Settings(data_dir=str(ROOT / "var"))


def test_later_sources_win(tmp_path: Path) -> None:
    content = {"port": 1, "admin_key": "file", "load_workers": 7}
    found = load(content, tmp_path, PORT="2", DATAPIPE_ADMIN_KEY="env", DATAPIPE_LOAD_WORKERS="")
    assert (found.port, found.admin_key, found.load_workers) == (2, "env", 7)
    over = settings.load({"port": 3, "host": None}, {"PORT": "2", "DATAPIPE_PORT": "4"})
    assert (over.port, over.host) == (3, "0.0.0.0")
    assert load(PORT="2", DATAPIPE_PORT="4").port == 4


def test_variables_are_text_and_json() -> None:
    found = load(
        DATAPIPE_REUSE_PORT="true", DATAPIPE_LOAD_INTERVAL="1.5", DATAPIPE_INGEST_KEYS='["a"]',
        DATAPIPE_EVENTS='{"x": {"y": "int"}}', DATABASE_URL="postgres://h/d", IRON_MQ_HOST="h",
        IRON_MQ_PROJECT_ID="p", IRON_MQ_TOKEN="t",
    )  # fmt: skip
    assert found.reuse_port is True
    assert found.load_interval == 1.5
    assert (found.ingest_keys, found.events) == (["a"], {"x": {"y": "int"}})
    assert (found.database_url, found.ironmq_host) == ("postgres://h/d", "h")
    assert found.mirror_kind == "ironmq"


@pytest.mark.parametrize(
    ("content", "env", "words"),
    [
        ({"prot": 1}, {}, ["prot", "'port'", "datapipe.json"]),
        ({"port": "x"}, {}, ["port", "a whole number", "'x'", "datapipe.json"]),
        ({"port": True}, {}, ["port", "a whole number"]),
        ({"port": -1}, {}, ["port", "at least 0"]),
        ({"port": 65536}, {}, ["port", "65535", "datapipe.json"]),
        ({"load_workers": 0}, {}, ["load_workers", "at least 1"]),
        ({"nats_lane_max_bytes": 1}, {}, ["nats_lane_max_bytes", "at least 1048576"]),
        ({"mirror": "disk"}, {}, ["'disk'", "auto", "ironmq", "nats", "none"]),
        ({"mirror_options": {"a": 1}}, {}, ["mirror_options.a", "datapipe.json", "there are none"]),
        ({"sink_options": []}, {}, ["sink_options", "JSON object"]),
        ({"mirror": "ironmq"}, {}, ["ironmq_project_id", "ironmq_token"]),
        (
            {"database_url": "oracle://x"},
            {},
            [
                "database_url",
                "postgresql://",
                "postgres://",
                "mysql://",
                "mariadb://",
                "sqlite:///",
            ],
        ),
        ({"database_url": "postgresql:x"}, {}, ["database_url", "begin with postgresql://"]),
        ({"ingest_keys": [""]}, {}, ["ingest_keys[0]", "datapipe.json"]),
        ({"ingest_keys": [1]}, {}, ["ingest_keys[0]", "str", "int"]),
        ({"events": {"a": {"b": 1}}}, {}, ["events", "str", "int"]),
        ({"data_dir": ""}, {}, ["data_dir", "text", "datapipe.json"]),
        ({"ingest_keys": "k"}, {}, ["ingest_keys", "JSON list"]),
        ({"cors_origins": ["https://x.example/"]}, {}, ["cors_origins", "'https://x.example/'"]),
        ({"cors_origins": ["x.example"]}, {}, ["cors_origins", "https://example.com"]),
        ({"cors_origins": ["null"]}, {}, ["cors_origins", "'null'"]),
        ({"log_level": "loud"}, {}, ["log_level", "warning"]),
        ({"load_interval": -1}, {}, ["load_interval"]),
        ("[1]", {}, ["one JSON object"]),
        ("{", {}, ["not JSON"]),
        (None, {"DATAPIPE_PROT": "1"}, ["DATAPIPE_PROT", "'port'"]),
        (None, {"PORT": "x"}, ["port", "PORT", "whole number"]),
        (None, {"DATAPIPE_REUSE_PORT": "perhaps"}, ["reuse_port", "true or false"]),
        (None, {"DATAPIPE_EVENTS": "{"}, ["events", 'JSON, like {"a": ...}']),
        (None, {"DATAPIPE_INGEST_KEYS": "k"}, ["ingest_keys", 'JSON, like ["a", "b"]']),
        (None, {"DATAPIPE_LOAD_INTERVAL": "nan"}, ["load_interval", "at least 0.05", "'nan'"]),
        (None, {"DATAPIPE_SHUTDOWN_TIMEOUT": "inf"}, ["shutdown_timeout", "a number", "'inf'"]),
        (None, {"DATAPIPE_CNF": "/nowhere.json"}, ["/nowhere.json", "can't be read"]),
        (None, {"DATAPIPE_CNF": "/nowhere.toml"}, ["/nowhere.toml", "can't be read"]),
        (None, {"DATAPIPE_CNF_FILE": "/x"}, ["cnf_file", "no such setting"]),
        (None, {"DATAPIPE_NATS_CREDS_FILE": "/x"}, ["nats_creds", "set DATAPIPE_NATS_CREDS"]),
        (None, {"DATAPIPE_ADMIN_KEY_FILE": "/no/such"}, ["admin_key", "'/no/such'", "No such"]),
        (None, {"DATAPIPE_ADMIN_KEY_FILE": "/dev/null"}, ["admin_key", "/dev/null", "is empty"]),
        (
            None,
            {"DATAPIPE_PORT": "1", "DATAPIPE_PORT_FILE": "/dev/null"},
            ["port", "DATAPIPE_PORT_FILE", "DATAPIPE_PORT is set, too", "leave one"],
        ),
        (None, {"DYNO": "web.1"}, ["mirror", "IRON_MQ_TOKEN", "NATS_URL"]),
    ],
)
def test_a_wrong_setting_is_one_clear_line(
    tmp_path: Path, content: Any, env: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        load(content, tmp_path, **env)
    text = str(refused.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_a_file_may_be_toml(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text(
        'load_interval = 60\ningest_keys = ["a", {name = "ios", key = "b", rate = 500}]\n'
        '[events.signup]\nuser_id = "int"\ntrial = "bool = false"\n'
    )
    found = settings.load(environ={"DATAPIPE_CNF": str(file)})
    assert found.load_interval == 60
    assert found.ingest_keys == ["a", settings.IngestKey(name="ios", key="b", rate=500)]
    assert found.events == {"signup": {"user_id": "int", "trial": "bool = false"}}
    for wrong, words in (
        ("load_interval = ", "is not TOML"),
        ("a = 1\na = 2", "is not TOML"),
        ('{"port": 1}', "is not TOML"),
        ("lod_interval = 60", "the nearest is 'load_interval'"),
        ("data_dir = 2026-11-26", "data_dir (from file"),
    ):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match=r"my\.toml") as refused:
            settings.load(environ={"DATAPIPE_CNF": str(file)})
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_variable_may_name_a_file_with_the_value(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret \n")
    (tmp_path / "keys").write_text('["a",\r\n{"name": "ios", "key": "b"}]\r\n')
    (tmp_path / "url").write_text("postgresql://h/d")
    (tmp_path / "number").write_bytes(b"\xff")
    env = {
        "DATAPIPE_ADMIN_KEY_FILE": str(tmp_path / "key"),
        "DATAPIPE_INGEST_KEYS_FILE": str(tmp_path / "keys"),
        "DATAPIPE_DATABASE_URL_FILE": str(tmp_path / "url"),
        "DATABASE_URL": "postgresql://platform/d",
        "DATAPIPE_PORT": "1", "DATAPIPE_PORT_FILE": "",
    }  # fmt: skip
    found = settings.load(environ=env)
    assert (found.admin_key, found.database_url, found.port) == ("s3cret ", "postgresql://h/d", 1)
    assert found.ingest_keys == ["a", settings.IngestKey(name="ios", key="b")]
    with pytest.raises(ConfigError, match=r"load_workers .*/number' can't be read: .*UTF-8"):
        load(DATAPIPE_LOAD_WORKERS_FILE=str(tmp_path / "number"))
    # the key that ends so is no such file
    (tmp_path / "ca").write_text("PEM")
    assert load(DATAPIPE_NATS_CA_FILE=str(tmp_path / "ca")).nats_ca_file == str(tmp_path / "ca")


# --- where the data is ---


def test_data_dir_starts_from_the_settings_file_if_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "my.json").write_text('{"load_workers": 1}')
    named = {"DATAPIPE_CNF": "../conf/my.json"}
    assert settings.load(environ={}).data_dir == str(tmp_path / "working" / "var")
    data_dir = settings.load(environ=named).data_dir
    assert Path(data_dir).is_absolute()
    assert Path(data_dir).resolve() == tmp_path / "conf" / "var"
    assert settings.load(environ=named | {"DATAPIPE_DATA_DIR": "/var/x"}).data_dir == "/var/x"


@pytest.mark.parametrize(
    ("left", "env", "stops"),
    [
        ("var/journal/0.sqlite", {}, True),
        ("other/journal/0.sqlite", {"DATAPIPE_DATA_DIR": "other"}, True),
        ("var/postgres/PG_VERSION", {}, True),
        ("var/postgres/PG_VERSION", {"DATABASE_URL": "postgresql://h/d"}, False),
        ("var/journal/0.sqlite", {"DATAPIPE_MIRROR": "none"}, False),
        ("var/peers/x", {}, False),
    ],
)
def test_events_of_1_0_are_not_left_behind(
    tmp_path: Path, left: str, env: dict[str, str], stops: bool
) -> None:
    """It had `data_dir` start from the working folder: what lies there is named."""
    (tmp_path / "my.json").write_text("{}")
    old, new = Path(left).absolute(), tmp_path / left
    old.parent.mkdir(parents=True)
    old.touch()
    environ = {"DATAPIPE_CNF": str(tmp_path / "my.json"), **env}
    if stops:
        folder = Path(left).parts[0]
        with pytest.raises(ConfigError) as refused:
            settings.load(environ=environ)
        for word in ("data_dir: ", f"move {Path(folder).absolute()} to {tmp_path / folder}"):
            assert word in str(refused.value)
        assert settings.read(environ=environ).settings.data_dir == str(tmp_path / folder)
        new.parent.mkdir(parents=True)
        new.touch()
    settings.load(environ=environ)
    settings.load(environ=env)  # no file is named: it is where it was


# --- logins in URLs, and what is shown of them ---


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p@ss@h/d", "postgresql://u:p/ss@h/d", "postgresql://u:50%off@h/d",
        "postgres://u:a?b/ss@h:5432/d", "mysql://u:p#ss@h/d", "mariadb://u:p?ss@h/d",
        "mysql://u:p/ss@h:3306/d", "mysql://u:p%ss@h/d",
        "postgresql://u:p@off/ss@h/d", "mysql://u:p@off/ss@h/d",
    ],
)  # fmt: skip
def test_a_password_that_is_not_escaped_is_named_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(DATABASE_URL=url)
    text = str(refused.value)
    assert text.startswith("database_url (from variable DATABASE_URL): in its user and password")
    assert "'@' %40" in text
    assert "ss@" not in text
    assert "off" not in text


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("postgresql://u:p%40s@h:1,h2:2/d?user=a@b", "postgresql://u:***@h:1,h2:2/d?user=a@b"),
        ("postgresql://u:p:q?r#s@h/d", "postgresql://u:***@h/d"),
        ("postgresql://u@h/d?sslmode=require", None),
        ("postgresql://h/d?passwor%64=x&sslpassword=y&a=b", "postgresql://h/d?passwor%64=***&sslpassword=***&a=b"),
        ("postgresql:///d?host=/run/x&application_name=a:b/c@d", None),
        ("postgresql://h?application_name=a:b/c@d", None),
        ("postgresql://u@h?application_name=a:b/c@d", None),
        ("postgresql://[::1]:5432/d@e", None),
        ("mysql://u:p%2Fs@h/d?ssl-mode=REQUIRED", "mysql://u:***@h/d?ssl-mode=REQUIRED"),
    ],
)  # fmt: skip
def test_a_url_is_shown_without_its_password(url: str, seen: str | None) -> None:
    found = settings.shown(load(DATABASE_URL=url))
    assert found["database_url"] == (seen or url)


def test_what_is_shown_hides_secrets() -> None:
    found = settings.shown(
        Settings(
            admin_key="s3cret", nats_password="s3cret", mirror_options={"a": "s3cret"},
            ingest_keys=["s3cret", settings.IngestKey(name="ios", key="s3cret", rate=5)],
            nats_url="nats://s3cret@a,tls://u:s3cret@b:1,nats://c", database_url="barn://s3cret",
        )
    )  # fmt: skip
    assert "s3cret" not in repr(found)
    assert found["nats_url"] == "nats://***@a,tls://u:***@b:1,nats://c"
    assert found["ingest_keys"] == ["***", {"name": "ios", "key": "***", "lanes": [], "rate": 5}]
    assert (found["ironmq_token"], found["admin_key"]) == ("", "***")
    assert list(found) == list(Settings.__struct_fields__)


@pytest.mark.parametrize(
    ("key", "value"),
    [("port", "80"), ("load_workers", 0), ("mirror_timeout", math.nan), ("log_format", "xml")],
)
def test_settings_made_directly_are_checked_as_well(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: must be "):
        settings.check(Settings(**{key: value}))


def test_secrets_are_not_shown() -> None:
    found = load(
        DATAPIPE_ADMIN_KEY="s3cret", DATAPIPE_INGEST_KEYS='["s3cret"]', IRON_MQ_TOKEN="s3cret",
        DATABASE_URL="postgres://u:s3cret@h/d", IRON_MQ_PROJECT_ID="p",
    )  # fmt: skip
    assert "s3cret" not in repr(found)
    assert "s3cret" not in repr(
        Settings(mirror_options={"a": "s3cret"}, sink_options={"b": "s3cret"})
    )
    for env in (
        {"DATAPIPE_INGEST_KEYS": '{"s3cret": 1}'},
        {"DATABASE_URL": "s3cret"},
        {"DATAPIPE_SINK_OPTIONS": '["s3cret"]'},
    ):
        with pytest.raises(ConfigError) as refused:
            load(**env)
        assert "s3cret" not in str(refused.value)


# --- databases ---


class Files(SinkPlugin):
    is_file = True

    def open(self, settings: Settings, process: str) -> AbstractAsyncContextManager[Database]:
        return MemoryDatabase().open(settings, process)


@pytest.fixture
def files_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sink that takes `sqlite:` is one that needs no driver."""
    monkeypatch.setattr(plugins, "_imported", lambda value: Files)


@pytest.mark.usefixtures("files_of_ours")
@pytest.mark.parametrize("named", [True, False])
def test_the_path_of_a_database_becomes_absolute_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """By the folder of the settings file, if one is named, else by the working folder."""
    (tmp_path / "conf").mkdir()
    monkeypatch.chdir(tmp_path if named else tmp_path / "conf")
    file = tmp_path / "conf" / "my.json"
    file.write_text("{}")
    env = {"DATAPIPE_CNF": "conf/my.json"} if named else {}
    for relative in ("events.db", "a/../b c%20.db"):
        found = settings.load({"database_url": f"sqlite:///{relative}"}, env)
        assert found.database_url == f"sqlite:///{tmp_path}/conf/{relative}"
        assert settings.load({"database_url": found.database_url}, env) == found
    absolute = "sqlite:////var/lib/events.db"
    assert settings.load({"database_url": absolute}, env).database_url == absolute


@pytest.mark.usefixtures("files_of_ours")
@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ("//events.db", ["sqlite:///events.db", "three slashes", "sqlite:////var/lib/events.db"]),
        ("events.db", ["sqlite:///events.db", "three slashes"]),
        ("/events.db", ["sqlite:///events.db", "three slashes"]),
        ("", ["sqlite:///events.db"]),
        ("//", ["sqlite:///events.db"]),
        ("///", ["sqlite:///events.db"]),
        ("////var/lib/", ["sqlite:///events.db"]),
        ("///a\0b", ["sqlite:///events.db"]),
        (":memory:", ["name a file", "sqlite:///events.db"]),
        ("//:memory:", ["name a file", "sqlite:///events.db"]),
        ("///:memory:", ["name a file", "sqlite:///events.db"]),
        ("///events.db?mode=ro", ["options", "'?'"]),
    ],
)
def test_a_database_file_that_is_misspelt_is_one_clear_line(rest: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load(DATABASE_URL=f"sqlite:{rest}")
    text = str(refused.value)
    assert text.startswith("database_url (from variable DATABASE_URL): must ")
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.mark.usefixtures("files_of_ours")
@pytest.mark.parametrize("command", [["schema"], ["new-event", "tick"]])
def test_commands_name_the_file_that_is_their_database(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("DATAPIPE_CNF", raising=False)
    monkeypatch.setenv("DATABASE_URL", "sqlite:///other.db")
    given = ["--database-url", "sqlite:///events.db"] if command == ["schema"] else []
    assert main([*command, *given]) == 0
    told = f"datapipe: database sqlite:///{tmp_path}/events.db\n" if given else ""
    assert capsys.readouterr().err == told


@pytest.mark.usefixtures("files_of_ours")
def test_a_schema_is_refused_where_there_are_none() -> None:
    with pytest.raises(ConfigError) as refused:
        load(DATABASE_URL="sqlite:///events.db", DATAPIPE_DATABASE_SCHEMA="mine")
    told = (
        "database_schema (from variable DATAPIPE_DATABASE_SCHEMA): sqlite:// has no schemas: "
        "leave it out"
    )
    assert str(refused.value) == told
    load(DATABASE_URL="sqlite:///events.db", DATAPIPE_DATABASE_SCHEMA="public")  # as in the sample


@pytest.mark.parametrize("scheme", ["mysql", "mariadb"])
def test_without_its_packages_a_database_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    def imported(value: str) -> Any:
        monkeypatch.setitem(sys.modules, "pymysql", None)
        __import__("pymysql")

    monkeypatch.setattr(plugins, "_imported", imported)
    with pytest.raises(ConfigError) as refused:
        settings.plugin(Settings(database_url=f"{scheme}://host/db"), "sink")
    told = f"database_url: '{scheme}' needs more packages: pip install 'datapipe[mysql]'"
    assert str(refused.value) == told


# --- NATS ---

SHARED = "postgresql://db.example/events"
CLUSTER = "nats://a.example:4222, tls://b.example, nats://[::1]:4333/"


def on_nats(**more: Any) -> Settings:
    return Settings(**{"nats_url": CLUSTER, "database_url": SHARED, **more})


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("creds", "seed", "ca", "cert", "key"):
        (tmp_path / name).write_text("s3cret")
    (tmp_path / "folder").mkdir()
    return tmp_path


def test_auto_takes_ironmq_then_nats_then_the_journal() -> None:
    ironmq = {"IRON_MQ_PROJECT_ID": "p", "IRON_MQ_TOKEN": "t"}
    nats = {"NATS_URL": "nats://a", "DATABASE_URL": SHARED}
    assert load(**ironmq, **nats).mirror_kind == "ironmq"
    assert load(**nats).mirror_kind == "nats"
    assert load(**nats, DYNO="web.1").mirror_kind == "nats"
    assert load(DATABASE_URL=SHARED).mirror_kind == "journal"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"mirror": "nats"},
        {"nats_url": "nats://us%er:pa:ss@a,nats://other:word@b:1"},
        {"nats_url": "tls://token@a:65535"},
        {"nats_creds": "creds", "nats_ca_file": "ca"},
        {"nats_nkey_file": "seed", "nats_cert_file": "cert", "nats_key_file": "key"},
        {"nats_user": "u", "nats_password": "s3cret"},
    ],
)
def test_settings_of_nats_that_fit(files: Path, given: dict[str, str]) -> None:
    settings.check(on_nats(**in_folder(files, given)))


@pytest.mark.parametrize(
    ("given", "key", "words"),
    [
        ({"mirror": "nats", "nats_url": ""}, "mirror", ["nats_url", "nats://host:4222"]),
        ({"mirror_timeout": 301.0}, "mirror_timeout", ["at most 300"]),
        (
            {"database_url": ""},
            "database_url",
            ["all processes share", "postgresql://", "mysql://"],
        ),
        ({"database_url": "sqlite:///s3cret.db"}, "database_url", ["all processes share"]),
        ({"nats_url": "a:4222"}, "nats_url", ["nats://host:4222", "tls://host:4222"]),
        ({"nats_url": "ws://s3cret@a"}, "nats_url", ["nats://", "number 1"]),
        ({"nats_url": "nats://a,nats://u:s3cret@"}, "nats_url", ["nats://", "number 2"]),
        ({"nats_url": "nats://a,"}, "nats_url", ["nats://", "number 2"]),
        ({"nats_url": "nats://u:s3cret@a:x"}, "nats_url", ["port", "65535"]),
        ({"nats_url": "nats://u:s3cret@a:65536"}, "nats_url", ["port", "65535"]),
        ({"nats_url": "nats://u:s3cret@a:0"}, "nats_url", ["port"]),
        ({"nats_url": "nats://u:s3/cret@a"}, "nats_url", ["port", "nats_user and nats_password"]),
        ({"nats_url": "nats://u:s3,cret@a"}, "nats_url", ["number 1", "nats_user"]),
        ({"nats_url": "nats://[a"}, "nats_url", ["nats://host:4222"]),
        ({"nats_url": "nats://a/s3cret"}, "nats_url", ["end with the host"]),
        (
            {"nats_creds": "creds", "nats_nkey_file": "seed"},
            "nats_creds",
            ["one way", "nats_creds and nats_nkey_file", "leave one"],
        ),
        (
            {"nats_nkey_file": "seed", "nats_user": "u", "nats_password": "s3cret"},
            "nats_nkey_file",
            ["nats_nkey_file and nats_user"],
        ),
        (
            {"nats_creds": "creds", "nats_url": "nats://u:s3cret@a"},
            "nats_creds",
            ["nats_creds and a login in nats_url"],
        ),
        ({"nats_password": "s3cret"}, "nats_password", ["needs nats_user"]),
        ({"nats_user": "s3cret"}, "nats_user", ["needs nats_password", "nats://TOKEN@HOST"]),
        ({"nats_cert_file": "cert"}, "nats_cert_file", ["needs nats_key_file"]),
        ({"nats_key_file": "key"}, "nats_key_file", ["needs nats_cert_file"]),
        ({"nats_creds": "none"}, "nats_creds", ["none'", "No such file"]),
        ({"nats_nkey_file": "folder"}, "nats_nkey_file", ["folder'", "Is a directory"]),
        ({"nats_ca_file": "none"}, "nats_ca_file", ["No such file"]),
        (
            {"nats_cert_file": "none", "nats_key_file": "key"},
            "nats_cert_file",
            ["none'", "No such file"],
        ),
        (
            {"nats_cert_file": "cert", "nats_key_file": "a\0"},
            "nats_key_file",
            ["can't be read"],
        ),
    ],
)
def test_a_wrong_setting_of_nats_is_one_clear_line(
    files: Path, given: dict[str, str], key: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        settings.check(on_nats(**in_folder(files, given)), {key: "variable X"})
    text = str(refused.value)
    assert text.startswith(f"{key} (from variable X): ")
    assert "\n" not in text
    assert "s3cret" not in text.replace(str(files), "")
    for word in words:
        assert word in text


def in_folder(folder: Path, given: dict[str, str]) -> dict[str, str]:
    """The same, with the paths of these files."""
    paths = {*settings.NATS_FILES}
    return {key: str(folder / value) if key in paths else value for key, value in given.items()}


def test_no_other_mirror_minds_the_settings_of_nats() -> None:
    settings.check(Settings(mirror="journal", nats_url="x", nats_password="y"))


@pytest.mark.parametrize("missing", ["nats", "nkeys"])
def test_without_its_packages_nats_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def imported(value: str) -> Any:
        monkeypatch.setitem(sys.modules, missing, None)
        __import__(missing)

    monkeypatch.setattr(plugins, "_imported", imported)
    with pytest.raises(ConfigError) as refused:
        settings.check(on_nats(), {"mirror": "variable X"})
    told = "mirror (from variable X): 'nats' needs more packages: pip install 'datapipe[nats]'"
    assert str(refused.value) == told


def test_secrets_of_nats_are_not_shown() -> None:
    given = on_nats(
        nats_url="nats://u:s3cret@a", nats_user="user", nats_password="s3cret", mirror="nats"
    )
    assert "s3cret" not in repr(given)
    with pytest.raises(ConfigError) as refused:
        load(NATS_URL="s3cret", DATABASE_URL=SHARED)
    assert "s3cret" not in str(refused.value)


def test_a_secret_that_is_no_text_is_named_and_not_shown() -> None:
    with pytest.raises(ConfigError) as refused:
        load(DATAPIPE_ADMIN_KEY="hidden\udcff")
    assert str(refused.value) == (
        "admin_key (from variable DATAPIPE_ADMIN_KEY): it is not text in UTF-8"
    )
