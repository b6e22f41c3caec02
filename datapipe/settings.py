"""The settings: one frozen structure, the default, the unit and the bounds beside each field.

Lowest first: the defaults here; the JSON file named by `$DATAPIPE_CNF`, or `/etc/datapipe.json`;
the platform's own variables (`PORT`, `DATABASE_URL`, `IRON_MQ_*`); `DATAPIPE_<KEY>`; the options
of the command. Nothing reads the environment at import.
"""

from __future__ import annotations

import importlib
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, inspect, structs

from datapipe.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

SYSTEM_FILE = Path("/etc/datapipe.json")

SECRETS = frozenset(
    {"ingest_keys", "admin_key", "database_url", "ironmq_token", "nats_url", "nats_password",
     "mirror_options", "sink_options"}
)  # fmt: skip

PLATFORM = {
    "PORT": "port",
    "DATABASE_URL": "database_url",
    "IRON_MQ_PROJECT_ID": "ironmq_project_id",
    "IRON_MQ_TOKEN": "ironmq_token",
    "IRON_MQ_HOST": "ironmq_host",
    "NATS_URL": "nats_url",
    "NATS_CREDS": "nats_creds",
}

# The mirrors and sinks that come with datapipe. Others are found by their entry points, which take
# 1 MB to look for; a name of ours is never looked up.
OURS = {
    "mirror": {
        "ironmq": "datapipe.mirrors.ironmq.mirror:IronMQPlugin",
        "journal": "datapipe.mirrors.journal.mirror:JournalPlugin",
        "nats": "datapipe.mirrors.nats.mirror:NatsPlugin",
        "none": "datapipe.mirrors.memory:MemoryPlugin",
    },
    "sink": {
        "postgres": "datapipe.sinks.postgres.sink:PostgresPlugin",
        "postgresql": "datapipe.sinks.postgres.sink:PostgresPlugin",
    },
}

# An append must be over long before the ledger forgets a segment: see `mirrors/nats/prune.py`.
NATS_TIMEOUT_S = 300.0
NATS_FILES = ("nats_creds", "nats_nkey_file", "nats_ca_file", "nats_cert_file", "nats_key_file")
EXTRAS = {"nats": "nats", "nkeys": "nats"}  # by the module that is missing

FINITE = sys.float_info.max  # an upper bound that excludes infinity

_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^\s/?#@A-Z]+")  # as browsers write it

_Struct = TypeVar("_Struct", bound=msgspec.Struct)


class Settings(
    msgspec.Struct, frozen=True, kw_only=True, repr_omit_defaults=True, forbid_unknown_fields=True
):
    """All settings. `load` reads them; tests make them directly.

    Sizes are bytes and times are seconds, unless the name ends in another unit.
    """

    host: str = "0.0.0.0"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    reuse_port: bool = False  # several processes on one port

    input_max_len: Annotated[int, Meta(ge=1)] = 2048  # bytes of one event's stored values
    body_max_len: Annotated[int, Meta(ge=1)] = 8_388_608  # bytes of one body, unpacked
    batch_max_events: Annotated[int, Meta(ge=1)] = 20_000
    inflight_max_bytes: Annotated[int, Meta(ge=65536)] = 33_554_432  # received, not yet durable
    # for a whole head, and for a whole body
    request_timeout: Annotated[float, Meta(ge=0.1, le=FINITE)] = 20.0

    ingest_keys: list[Annotated[str, Meta(min_length=1)]] = []  # empty: anyone may post
    admin_key: str = ""
    cors_origins: list[str] = []  # whose pages may post

    builtin_events: bool = True  # crash_report, purchase, install
    event_modules: list[Annotated[str, Meta(min_length=1)]] = []
    events: dict[str, dict[str, str]] = {}  # types without code: name -> field -> type

    database_url: str = ""  # its scheme names the sink; empty: embedded PostgreSQL in data_dir
    database_schema: str = "public"
    sink_options: dict[str, Any] = {}  # of a third party's sink, checked by it

    mirror: str = "auto"
    mirror_options: dict[str, Any] = {}  # of a third party's mirror, checked by it
    data_dir: Annotated[str, Meta(min_length=1)] = "var"
    journal_max_bytes: Annotated[int, Meta(ge=65536)] = 1_073_741_824
    ironmq_host: str = "mq-aws-us-east-1-1.iron.io"
    ironmq_project_id: str = ""
    ironmq_token: str = ""
    ironmq_queue_prefix: str = ""
    ironmq_max_bytes: Annotated[int, Meta(ge=65536)] = 1_073_741_824
    nats_url: str = ""  # several by comma, each with its login, if it has one
    nats_creds: str = ""  # this and the other files: paths
    nats_nkey_file: str = ""
    nats_user: str = ""
    nats_password: str = ""
    nats_ca_file: str = ""
    nats_cert_file: str = ""
    nats_key_file: str = ""
    nats_prefix: Annotated[str, Meta(pattern="^[A-Za-z0-9_-]+$")] = "datapipe"
    nats_replicas: Annotated[int, Meta(ge=0, le=5)] = 0  # 0: the cluster's nodes, at most 3
    nats_lane_max_bytes: Annotated[int, Meta(ge=1_048_576)] = 268_435_456  # reserved there
    mirror_linger_ms: Annotated[int, Meta(ge=0)] = 0
    mirror_timeout: Annotated[float, Meta(ge=0.1, le=FINITE)] = 10.0

    buffer_max_bytes: Annotated[int, Meta(ge=0)] = 67_108_864  # held in memory, with overhead
    load_interval: Annotated[float, Meta(ge=0.05, le=FINITE)] = 300.0
    load_min_interval: Annotated[float, Meta(ge=0, le=FINITE)] = 10.0
    load_trigger_bytes: Annotated[int, Meta(ge=1)] = 16_777_216
    load_workers: Annotated[int, Meta(ge=1)] = 3
    load_chunk_bytes: Annotated[int, Meta(ge=1024)] = 524_288  # one COPY write
    dedupe_window: Annotated[float, Meta(ge=1, le=FINITE)] = 604_800.0

    shutdown_timeout: Annotated[float, Meta(ge=0, le=FINITE)] = 25.0
    log_level: Literal["debug", "info", "warning", "error", "critical"] = "info"
    log_format: Literal["json", "console"] = "json"

    def __repr__(self) -> str:
        shown = (
            f"{key}={'***' if key in SECRETS and getattr(self, key) else repr(getattr(self, key))}"
            for key in self.__struct_fields__
        )
        return f"Settings({', '.join(shown)})"

    @property
    def mirror_kind(self) -> str:
        """Which mirror is meant: `auto` takes a remote one whose settings are there."""
        if self.mirror != "auto":
            return self.mirror
        if self.ironmq_project_id and self.ironmq_token:
            return "ironmq"
        return "nats" if self.nats_url else "journal"

    @property
    def sink_kind(self) -> str:
        """Which sink is meant: the scheme of `database_url`."""
        return self.database_url.partition("://")[0] if self.database_url else "postgresql"


class Plugin(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What an entry point names: a class whose fields are the options of a mirror or a sink."""


def load(
    options: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    run_defaults: Mapping[str, Any] | None = None,
) -> Settings:
    """Read the settings from all their sources.

    Args:
        options: of the command, highest; None values count as not given.
        environ: variables, `os.environ` when not given.
        run_defaults: defaults of `make run`, lowest but for those in this file.
    Raises: ConfigError: one line that names the key, the source and the remedy.
    """
    env = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, given, strict in _sources(options or {}, env, run_defaults or {}):
        checked = _convert(given, Settings, source, strict=strict)
        values |= {key: getattr(checked, key) for key in given}
        sources |= dict.fromkeys(given, source)
    settings = Settings(**values)
    check(settings, sources)
    if settings.mirror == "auto" and settings.mirror_kind == "journal" and env.get("DYNO"):
        raise ConfigError(
            "mirror: this is a Heroku dyno (DYNO is set), whose disk is lost at least daily: set "
            "IRON_MQ_PROJECT_ID and IRON_MQ_TOKEN, or NATS_URL, or set mirror to 'journal' or "
            "'none' yourself"
        )
    return settings


def check(settings: Settings, sources: Mapping[str, str] | None = None) -> None:
    """Refuse what is out of range, and an unknown mirror or sink.

    Args: sources: where a key's value came from.
    Raises: ConfigError: names the key and its source.
    """
    origins = sources or {}
    _convert(structs.asdict(settings), Settings, None)
    if settings.mirror == "ironmq" and not (settings.ironmq_project_id and settings.ironmq_token):
        why = "'ironmq' needs ironmq_project_id and ironmq_token"
        raise _wrong("mirror", why, origins.get("mirror"))
    if settings.mirror_kind == "nats":
        for key, why in _nats_faults(settings):
            raise _wrong(key, why, origins.get(key))
    if not settings.database_schema or "\0" in settings.database_schema:
        raise _wrong("database_schema", "must name a schema", origins.get("database_schema"))
    for origin in settings.cors_origins:
        if not _ORIGIN.fullmatch(origin):
            why = f"{origin!r} is neither '*' nor like 'https://example.com'"
            raise _wrong("cors_origins", why, origins.get("cors_origins"))
    plugin(settings, "mirror", origins)
    plugin(settings, "sink", origins)


def _nats_faults(settings: Settings) -> Iterator[tuple[str, str]]:
    """What is wrong with the settings of `mirror: nats`: keys and why, with the remedy."""
    if not settings.nats_url:
        yield "mirror", "'nats' needs nats_url, such as nats://host:4222"
    if settings.mirror_timeout > NATS_TIMEOUT_S:
        yield "mirror_timeout", f"must be at most {NATS_TIMEOUT_S:g} with mirror 'nats'"
    for number, url in enumerate(settings.nats_url.split(","), 1):
        if why := _nats_url_fault(url.strip()):
            yield "nats_url", f"{why} (the URL at place {number}; several are parted by commas)"
    if not settings.database_url or settings.database_url.startswith("sqlite:"):
        why = "mirror 'nats' needs a database that all processes share: postgresql://..."
        yield "database_url", why
    keys = [key for key in ("nats_creds", "nats_nkey_file", "nats_user") if getattr(settings, key)]
    keys += ["a login in nats_url"] if "@" in settings.nats_url else []
    if len(keys) > 1:
        yield keys[0], f"one way to log in is wanted, not {' and '.join(keys)}: leave one"
    for key, other in (
        ("nats_password", "nats_user"),
        ("nats_user", "nats_password"),  # a user alone may be meant for a token
        ("nats_cert_file", "nats_key_file"),
        ("nats_key_file", "nats_cert_file"),
    ):
        if getattr(settings, key) and not getattr(settings, other):
            more = "; a token goes into nats_url: nats://TOKEN@HOST" if key == "nats_user" else ""
            yield key, f"needs {other} as well{more}"
    for key in NATS_FILES:
        try:
            if path := getattr(settings, key):
                Path(path).open("rb").close()
        except (OSError, ValueError) as exc:
            why = exc.strerror if isinstance(exc, OSError) else "this is no path"
            yield key, f"{path!r} can't be read: {why}"


def _nats_url_fault(url: str) -> str | None:
    """What is wrong with one URL; never shows it, as it may hold a password."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "must be like nats://host:4222, with a port from 1 to 65535"
    if parts.scheme not in ("nats", "tls") or not parts.hostname:
        return "must be like nats://host:4222 or tls://host:4222"
    if port == 0 or parts.path.strip("/") or parts.query or parts.fragment:
        return "must end with the host or a port from 1 to 65535"
    return None


def plugin(
    settings: Settings, room: Literal["mirror", "sink"], sources: Mapping[str, str] | None = None
) -> Any:
    """The mirror or the sink that the settings name: a `Plugin` with its options in its fields.

    Raises: ConfigError: none has that name, it can't be imported, or an option is wrong.
    """
    origins = sources or {}
    key, name = "mirror", settings.mirror_kind
    if room == "sink":
        key, name = "database_url", settings.sink_kind
    source = origins.get(key)
    load: Callable[[], Any]
    if which := OURS[room].get(name):
        load = partial(_imported, which)
    else:
        found = _others(room, key, name, source)
        which, load = f"{found.value}{_package(found)}", found.load
    try:
        kind = load()
    except Exception as exc:  # whatever importing it raises
        if isinstance(exc, ModuleNotFoundError) and (extra := EXTRAS.get(exc.name or "")):
            why = f"{name!r} needs more packages: pip install 'datapipe[{extra}]'"
            raise _wrong(key, why, source) from exc
        why = f"{type(exc).__name__}: {' '.join(str(exc).split())}"
        raise _wrong(key, f"{name!r}, {which}, can't be imported: {why}", source) from exc
    if not (isinstance(kind, type) and issubclass(kind, Plugin)):
        raise _wrong(key, f"{name!r}, {which}, is no Plugin", source)
    within = f"{room}_options"
    return _convert(getattr(settings, within), kind, origins.get(within), within=within)


def _imported(value: str) -> Any:
    module, _, name = value.partition(":")
    return getattr(importlib.import_module(module), name)


def _others(room: str, key: str, name: str, source: str | None) -> EntryPoint:
    """The one that a package of somebody else's gives that name. Raises: ConfigError."""
    from importlib.metadata import entry_points

    known = entry_points(group=f"datapipe.{room}s")
    found = [each for each in known if each.name == name]
    if not found:
        names = [*OURS[room], *(each.name for each in known)]
        shown = ", ".join(f"{each}://" if room == "sink" else each for each in names)
        wanted = "must begin with one of" if room == "sink" else f"{name!r} is none of auto,"
        raise _wrong(key, f"{wanted} {shown}", source)
    if len(found) > 1:
        which = " and ".join(f"{each.value}{_package(each)}" for each in found)
        raise _wrong(key, f"{name!r} is the name of {which}: uninstall one of them", source)
    return found[0]


def _package(entry: EntryPoint) -> str:
    return f" of {entry.dist.name}" if entry.dist else ""


def _sources(
    options: Mapping[str, Any], env: Mapping[str, str], run_defaults: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """Each source, lowest first: its name, its values, and whether they are typed.

    Those of variables are not: they are text, or, for lists and objects, JSON.
    """
    yield "the defaults of make run", run_defaults, True
    named = env.get("DATAPIPE_CNF")
    path = Path(named) if named else SYSTEM_FILE
    if named or path.exists():
        yield f"file {path}", _content(path), True
    given = [(variable, key, env.get(variable)) for variable, key in PLATFORM.items()]
    prefix = "DATAPIPE_"
    given += [
        (variable, variable.removeprefix(prefix).lower(), text)
        for variable, text in env.items()
        if variable.startswith(prefix) and variable != "DATAPIPE_CNF"
    ]
    for variable, key, text in given:
        if text:
            source = f"variable {variable}"
            yield source, {key: _decoded(key, text, source)}, False
    given_options = {key: value for key, value in options.items() if value is not None}
    yield "the command line", given_options, True


def _content(path: Path) -> dict[str, Any]:
    try:
        content = msgspec.json.decode(path.read_bytes())
    except OSError as exc:
        raise ConfigError(f"the settings file {path} can't be read: {exc.strerror}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"the settings file {path} is not JSON: {exc}") from exc
    if not isinstance(content, dict):
        raise ConfigError(f"the settings file {path} must hold one JSON object")
    return content


def _decoded(key: str, text: str, source: str) -> Any:
    if not isinstance(_types(Settings).get(key), inspect.ListType | inspect.DictType):
        return text
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise _wrong(key, "must be JSON", source) from None


def _convert(
    values: Mapping[str, Any],
    kind: type[_Struct],
    source: str | None,
    *,
    within: str = "",
    strict: bool = True,
) -> _Struct:
    """The values as a structure of that kind.

    Args: within: the key that holds them, if any; then no value is shown: it may be a secret.
    Raises: ConfigError: names the key, the source and what is wanted.
    """
    try:
        return msgspec.convert(values, kind, strict=strict)
    except msgspec.ValidationError as exc:
        what, _, path = str(exc).partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    types = _types(kind)
    key = ".".join(filter(None, (within, path)))
    if field := re.fullmatch(r"Object (.+) field `(.+)`", what):
        key = ".".join(filter(None, (key, field[2])))
        if field[1] == "missing required":
            raise _wrong(key, "must be given", source)
        import difflib

        near = difflib.get_close_matches(field[2], types, n=1, cutoff=0.0)
        remedy = f"; the nearest is {near[0]!r}" if near else "; there are none"
        origin = f" ({source})" if source else ""
        raise ConfigError(f"{key}: no such setting{origin}{'' if path else remedy}")
    why = re.sub("(Invalid enum value).*", r"\1", what)
    if wanted := _wanted(types.get(path)):
        why = f"must be {wanted}"
        if not within and path not in SECRETS:
            why += f", not {reprlib.repr(values[path])}"
    raise _wrong(key, why, source)


def _types(kind: type[msgspec.Struct]) -> dict[str, inspect.Type]:
    described = inspect.type_info(kind)
    assert isinstance(described, inspect.StructType)
    return {field.encode_name: field.type for field in described.fields}


_WORDS: dict[type[inspect.Type], str] = {
    inspect.BoolType: "true or false",
    inspect.IntType: "a whole number",
    inspect.FloatType: "a number",
    inspect.StrType: "text",
    inspect.ListType: "a JSON list",
    inspect.DictType: "a JSON object",
}


def _wanted(kind: inspect.Type | None) -> str | None:
    """What a value of this type must be, in words; None: use msgspec's own message."""
    if isinstance(kind, inspect.LiteralType):
        return f"one of {', '.join(map(str, kind.values))}"
    words = _WORDS.get(type(kind)) if kind else None
    least, most = getattr(kind, "ge", None), getattr(kind, "le", None)
    if words and least is not None:
        words += f" of at least {least:.15g}"
    if words and most not in (None, FINITE):
        words += f" and at most {most:.15g}"
    return words


def _wrong(key: str, why: str, source: str | None) -> ConfigError:
    return ConfigError(f"{key}{f' (from {source})' if source else ''}: {why}")
