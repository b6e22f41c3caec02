"""The settings: one frozen structure, the default and the unit beside each field.

Lowest first: the defaults here; the JSON file named by `$DATAPIPE_CNF`, or `/etc/datapipe.json`;
the platform's own variables (`PORT`, `DATABASE_URL`, `IRON_MQ_*`); `DATAPIPE_<KEY>`; the options
of the command. Nothing reads the environment at import.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from datapipe.errors import ConfigError

SYSTEM_FILE = Path("/etc/datapipe.json")

SECRETS = frozenset({"ingest_keys", "admin_key", "database_url", "ironmq_token"})

PLATFORM = {
    "PORT": "port",
    "DATABASE_URL": "database_url",
    "IRON_MQ_PROJECT_ID": "ironmq_project_id",
    "IRON_MQ_TOKEN": "ironmq_token",
    "IRON_MQ_HOST": "ironmq_host",
}

CHOICES = {
    "mirror": ("auto", "journal", "ironmq", "none"),
    "log_level": ("debug", "info", "warning", "error", "critical"),
    "log_format": ("json", "console"),
}

LEAST: dict[str, float] = {
    "port": 0,
    "input_max_len": 1,
    "body_max_len": 1,
    "batch_max_events": 1,
    "inflight_max_bytes": 65536,
    "request_timeout": 0.1,
    "journal_max_bytes": 65536,
    "ironmq_max_bytes": 65536,
    "mirror_linger_ms": 0,
    "mirror_timeout": 0.1,
    "buffer_max_bytes": 0,
    "load_interval": 0.05,
    "load_min_interval": 0,
    "load_trigger_bytes": 1,
    "load_workers": 1,
    "load_chunk_bytes": 1024,
    "dedupe_window": 1,
    "shutdown_timeout": 0,
}

_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^\s/?#@A-Z]+")  # as browsers write it


class Settings(msgspec.Struct, frozen=True, kw_only=True, repr_omit_defaults=True):
    """What the service is told. `load` reads it; tests make it directly.

    Sizes are bytes and times are seconds, unless the name ends in another unit.
    """

    host: str = "0.0.0.0"
    port: int = 8080
    reuse_port: bool = False  # several processes on one port

    input_max_len: int = 2048  # bytes of one event's stored values
    body_max_len: int = 8_388_608  # bytes of one body, unpacked
    batch_max_events: int = 20_000
    inflight_max_bytes: int = 33_554_432  # received, or rows not yet durable
    request_timeout: float = 20.0  # for a whole head, and for a whole body

    ingest_keys: list[str] = []  # empty: anyone may post
    admin_key: str = ""
    cors_origins: list[str] = []  # whose pages may post

    event_modules: list[str] = []
    events: dict[str, dict[str, str]] = {}  # types without code: name -> field -> type

    database_url: str = ""  # empty: embedded PostgreSQL in data_dir
    database_schema: str = "public"

    mirror: str = "auto"
    data_dir: str = "var"
    journal_max_bytes: int = 1_073_741_824
    ironmq_host: str = "mq-aws-us-east-1-1.iron.io"
    ironmq_project_id: str = ""
    ironmq_token: str = ""
    ironmq_queue_prefix: str = ""
    ironmq_max_bytes: int = 1_073_741_824
    mirror_linger_ms: int = 0
    mirror_timeout: float = 10.0

    buffer_max_bytes: int = 67_108_864  # segments held in memory, with their overhead
    load_interval: float = 300.0
    load_min_interval: float = 10.0
    load_trigger_bytes: int = 16_777_216
    load_workers: int = 3
    load_chunk_bytes: int = 524_288  # one COPY write
    dedupe_window: float = 604_800.0

    shutdown_timeout: float = 25.0
    log_level: str = "info"
    log_format: str = "json"

    def __repr__(self) -> str:
        shown = (
            f"{key}={'***' if key in SECRETS and getattr(self, key) else repr(getattr(self, key))}"
            for key in self.__struct_fields__
        )
        return f"Settings({', '.join(shown)})"

    @property
    def mirror_kind(self) -> str:
        """Which mirror is meant: `auto` takes IronMQ when its credentials are set."""
        if self.mirror != "auto":
            return self.mirror
        return "ironmq" if self.ironmq_project_id and self.ironmq_token else "journal"


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

    def take(key: str, value: Any, source: str) -> None:
        values[key] = value
        sources[key] = source

    for key, value in (run_defaults or {}).items():
        take(key, value, "the defaults of make run")
    for key, value, source in _from_file(env):
        take(key, _checked_type(key, value, source), source)
    for variable, key in PLATFORM.items():
        if env.get(variable):
            take(key, _from_text(key, env[variable], variable), variable)
    for variable, text in env.items():
        if variable.startswith("DATAPIPE_") and variable != "DATAPIPE_CNF" and text:
            key = _known(variable.removeprefix("DATAPIPE_").lower(), f"variable {variable}")
            take(key, _from_text(key, text, variable), variable)
    for key, value in (options or {}).items():
        if value is not None:
            take(key, _checked_type(key, value, "the command line"), "the command line")
    settings = Settings(**values)
    check(settings, sources)
    if settings.mirror == "auto" and settings.mirror_kind == "journal" and env.get("DYNO"):
        raise ConfigError(
            "mirror: this is a Heroku dyno (DYNO is set), whose disk is lost at least daily: set "
            "IRON_MQ_PROJECT_ID and IRON_MQ_TOKEN, or set mirror to 'journal' or 'none' yourself"
        )
    return settings


def check(settings: Settings, sources: Mapping[str, str] | None = None) -> None:
    """Refuse values out of range. Raises: ConfigError that names the key and its source."""

    def refuse(key: str, why: str) -> None:
        source = (sources or {}).get(key)
        raise ConfigError(f"{key}{f' (from {source})' if source else ''}: {why}")

    for key, allowed in CHOICES.items():
        if (value := getattr(settings, key)) not in allowed:
            refuse(key, f"{value!r} is none of {', '.join(allowed)}")
    for key, least in LEAST.items():
        # `not >=` also refuses NaN
        if not getattr(settings, key) >= least or getattr(settings, key) == float("inf"):
            refuse(key, f"must be a number of at least {least:g}, not {getattr(settings, key)}")
    if settings.port > 65535:
        refuse("port", f"must be at most 65535, not {settings.port}")
    if settings.mirror == "ironmq" and not (settings.ironmq_project_id and settings.ironmq_token):
        refuse("mirror", "'ironmq' needs ironmq_project_id and ironmq_token")
    url = settings.database_url
    if url and not url.startswith(("postgres://", "postgresql://")):
        refuse("database_url", "must begin with postgres:// or postgresql://")
    if not settings.database_schema or "\0" in settings.database_schema:
        refuse("database_schema", "must name a schema")
    for key in ("ingest_keys", "cors_origins", "event_modules"):
        if not all(getattr(settings, key)):
            refuse(key, "has an empty entry")
    for origin in settings.cors_origins:
        if not _ORIGIN.fullmatch(origin):
            refuse("cors_origins", f"{origin!r} is neither '*' nor like 'https://example.com'")
    if not settings.data_dir:
        refuse("data_dir", "must name a folder")


def _from_file(env: Mapping[str, str]) -> list[tuple[str, Any, str]]:
    named = env.get("DATAPIPE_CNF")
    path = Path(named) if named else SYSTEM_FILE
    if not named and not path.exists():
        return []
    try:
        content = msgspec.json.decode(path.read_bytes())
    except OSError as exc:
        raise ConfigError(f"the settings file {path} can't be read: {exc.strerror}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"the settings file {path} is not JSON: {exc}") from exc
    if not isinstance(content, dict):
        raise ConfigError(f"the settings file {path} must hold one JSON object")
    return [(_known(key, f"file {path}"), value, str(path)) for key, value in content.items()]


def _known(key: str, source: str) -> str:
    if key in Settings.__struct_fields__:
        return key
    near = difflib.get_close_matches(key, Settings.__struct_fields__, n=1, cutoff=0.0)
    raise ConfigError(f"{key}: no such setting ({source}); the nearest is {near[0]!r}")


def _from_text(key: str, text: str, source: str) -> Any:
    """A variable's text as the setting's type; lists and objects are JSON."""
    wanted = get_type_hints(Settings)[key]
    if wanted in (str, int, float, bool):
        return _checked_type(key, text, source, strict=wanted is str)
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise ConfigError(f"{key} (from {source}): must be JSON") from None
    return _checked_type(key, value, source)


def _checked_type(key: str, value: Any, source: str, *, strict: bool = True) -> Any:
    wanted = get_type_hints(Settings)[key]
    try:
        return msgspec.convert(value, wanted, strict=strict)
    except msgspec.ValidationError as exc:
        detail = f"must be {_name(wanted)}" if key in SECRETS or not strict else str(exc)
        raise ConfigError(f"{key} (from {source}): {detail}") from None


def _name(wanted: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(wanted, "a JSON list" if wanted == list[str] else "a JSON object")
