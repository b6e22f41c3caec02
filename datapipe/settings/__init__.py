"""The settings: one frozen structure, the default, the unit and the bounds beside each field.

Lowest first: the defaults here; the file named by `--config` or `$DATAPIPE_CNF`, or
`/etc/datapipe.json`; the platform's own variables (`PORT`, `DATABASE_URL`, `IRON_MQ_*`);
`DATAPIPE_<KEY>` or `DATAPIPE_<KEY>_FILE`; the options of the command. Nothing reads the environment
at import.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, structs

from datapipe.errors import ConfigError
from datapipe.settings.ingest_keys import IngestKey, key_fault
from datapipe.settings.nats import NATS_FILES, nats_faults
from datapipe.settings.plugins import OURS, Plugin, Room, plugin
from datapipe.settings.shown import shown
from datapipe.settings.sources import (
    FILE_VARIABLE,
    PLATFORM,
    SYSTEM_FILE,
    Source,
    file_sources,
    named_file,
    variable_sources,
)
from datapipe.settings.values import FINITE, SECRETS, convert, seconds_of, types_of, wrong

__all__ = [
    "FILE_VARIABLE", "NATS_FILES", "OURS", "PLATFORM", "SECRETS", "SYSTEM_FILE", "Found",
    "IngestKey", "Plugin", "Room", "Settings", "check", "load", "plugin", "read", "shown",
]  # fmt: skip

_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^\s/?#@A-Z]+")  # as browsers write it


class Settings(
    msgspec.Struct, frozen=True, kw_only=True, repr_omit_defaults=True, forbid_unknown_fields=True
):
    """All settings. `load` reads them; tests make them directly.

    Sizes are bytes and times are seconds, unless the name ends in another unit.
    """

    host: str = "0.0.0.0"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    reuse_port: bool = False  # several processes on one port

    input_max_len: Annotated[int, Meta(ge=1)] = 16_384  # bytes of one event's stored values
    body_max_len: Annotated[int, Meta(ge=1)] = 8_388_608  # bytes of one body, unpacked
    batch_max_events: Annotated[int, Meta(ge=1)] = 20_000
    inflight_max_bytes: Annotated[int, Meta(ge=65536)] = 33_554_432  # received, not yet durable
    # for a whole head, and for a whole body
    request_timeout: Annotated[float, Meta(ge=0.1, le=FINITE)] = 20.0

    ingest_keys: list[Annotated[str, Meta(min_length=1)] | IngestKey] = []  # empty: anyone may post
    claims_max_bytes: Annotated[int, Meta(ge=0)] = 8_388_608  # memory for idempotency keys seen
    admin_key: str = ""
    cors_origins: list[str] = []  # whose pages may post

    builtin_events: bool = True  # crash_report, purchase, install
    event_modules: list[Annotated[str, Meta(min_length=1)]] = []
    events: dict[str, dict[str, str]] = {}  # types without code: name -> field -> type
    unknown_events: Literal["reject", "keep"] = "reject"  # those of types that are not registered
    unknown_retention: str = "30 days"  # of kept ones

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
    log_format: Literal["auto", "json", "console"] = "auto"

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
        return self.database_url.partition(":")[0] if self.database_url else "postgresql"


class Found(NamedTuple):
    """The settings that were read.

    Attributes:
        sources: of each key that is not left at its default: where its value came from.
        former: where release 1.0 had `data_dir`, if that was elsewhere.
    """

    settings: Settings
    sources: dict[str, str]
    former: Path | None


def load(
    options: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    run_defaults: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings to work by: see `read`.

    Raises: ConfigError: also where events would be left behind in another `data_dir`.
    """
    settings, _, former = read(options, environ, run_defaults=run_defaults)
    if former:
        _refuse_to_leave_behind(settings, former)
    return settings


def read(
    options: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    run_defaults: Mapping[str, Any] | None = None,
) -> Found:
    """Read the settings from all their sources.

    `data_dir`, and `database_url` where it names a file, have absolute paths then.

    Args:
        options: of the command, highest; None values count as not given.
        environ: variables, `os.environ` when not given.
        run_defaults: defaults of `make run`, lowest but for those in this file.
    Raises: ConfigError: one line that names the key, the source and the remedy.
    """
    env = os.environ if environ is None else environ
    given_options = {key: value for key, value in (options or {}).items() if value is not None}
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source in chain(
        [Source("the defaults of make run", run_defaults or {})],
        file_sources(env),
        variable_sources(env, types_of(Settings)),
        [Source("the command line", given_options)],
    ):
        checked = convert(source.values, Settings, source.name, strict=source.typed)
        values |= {key: getattr(checked, key) for key in source.values}
        sources |= dict.fromkeys(source.values, source.name)
    settings = Settings(**values)
    check(settings, sources)
    if settings.mirror == "auto" and settings.mirror_kind == "journal" and env.get("DYNO"):
        raise ConfigError(
            "mirror: this is a Heroku dyno (DYNO is set), whose disk is lost at least daily: set "
            "IRON_MQ_PROJECT_ID and IRON_MQ_TOKEN, or NATS_URL, or set mirror to 'journal' or "
            "'none' yourself"
        )
    named = named_file(env)
    folder = (named.parent if named else Path()).absolute()
    here, former = folder / settings.data_dir, Path(settings.data_dir).absolute()
    settings = structs.replace(settings, data_dir=str(here))
    settled: Settings = plugin(settings, "sink").settled(settings, folder)
    return Found(settled, sources, None if former == here else former)


def _refuse_to_leave_behind(settings: Settings, former: Path) -> None:
    """Stop where what release 1.0 kept lies in the working folder, and nothing beside the file."""
    before = structs.replace(settings, data_dir=str(former))
    plugins: list[Plugin] = [plugin(settings, "mirror"), plugin(settings, "sink")]
    for each in plugins:
        left, kept = each.kept_in(before), each.kept_in(settings)
        if left and kept and _holds_something(left) and not _holds_something(kept):
            raise ConfigError(
                f"data_dir: it is {settings.data_dir} now, relative to the settings file; release "
                f"1.0 took it relative to the working folder, and {left} is there: move {former} "
                f"to {settings.data_dir}, or set data_dir to {former}"
            )


def _holds_something(folder: Path) -> bool:
    with suppress(OSError):
        return any(folder.iterdir())
    return False


def check(settings: Settings, sources: Mapping[str, str] | None = None) -> None:
    """Refuse what is out of range, an unknown mirror or sink, and what these refuse.

    Args: sources: where a key's value came from.
    Raises: ConfigError: names the key and its source.
    """
    origins = sources or {}
    convert(structs.asdict(settings), Settings, None)
    if settings.mirror == "ironmq" and not (settings.ironmq_project_id and settings.ironmq_token):
        why = "'ironmq' needs ironmq_project_id and ironmq_token"
        raise wrong("mirror", why, origins.get("mirror"))
    if settings.mirror_kind == "nats":
        for key, why in nats_faults(settings):
            raise wrong(key, why, origins.get(key))
    if not settings.database_schema or "\0" in settings.database_schema:
        raise wrong("database_schema", "must name a schema", origins.get("database_schema"))
    try:
        seconds_of(settings.unknown_retention)
    except ValueError as exc:
        raise wrong("unknown_retention", str(exc), origins.get("unknown_retention")) from None
    if contradiction := key_fault(settings.ingest_keys):
        raise wrong("ingest_keys", contradiction, origins.get("ingest_keys"))
    for origin in settings.cors_origins:
        if not _ORIGIN.fullmatch(origin):
            why = f"{origin!r} is neither '*' nor like 'https://example.com'"
            raise wrong("cors_origins", why, origins.get("cors_origins"))
    plugins = plugin(settings, "mirror", origins), plugin(settings, "sink", origins)
    for key, why in chain.from_iterable(each.faults(settings) for each in plugins):
        raise wrong(key, why, origins.get(key))
