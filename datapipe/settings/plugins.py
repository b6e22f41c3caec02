"""The mirrors and sinks that there are, and the two that the settings name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from datapipe.settings.values import convert, wrong

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from datapipe.settings import Settings

Room = Literal["mirror", "sink"]

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
        "postgresql": "datapipe.sinks.postgres.sink:PostgresPlugin",
        "postgres": "datapipe.sinks.postgres.sink:PostgresPlugin",
        "mysql": "datapipe.sinks.mysql.sink:MysqlPlugin",
        "mariadb": "datapipe.sinks.mysql.sink:MysqlPlugin",
        "sqlite": "datapipe.sinks.sqlite.sink:SqlitePlugin",
    },
}
# by the module that is missing
EXTRAS = {"nats": "nats", "nkeys": "nats", "pymysql": "mysql"}


class Plugin(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What an entry point names: a class whose fields are the options of a mirror or a sink."""

    def faults(self, settings: Settings) -> Iterable[tuple[str, str]]:
        """What is wrong with the settings, for whoever takes this one: keys and why, with the
        remedy.
        """
        return ()

    def settled(self, settings: Settings, folder: Path) -> Settings:
        """The settings as this one means them; `faults` found none.

        Args: folder: what relative paths start from.
        """
        return settings

    def kept_in(self, settings: Settings) -> Path | None:
        """The folder within `data_dir` that holds what must not be lost, if there is to be one."""
        return None


def plugin(settings: Settings, room: Room, sources: Mapping[str, str] | None = None) -> Any:
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
            raise wrong(key, why, source) from exc
        why = f"{type(exc).__name__}: {' '.join(str(exc).split())}"
        raise wrong(key, f"{name!r}, {which}, can't be imported: {why}", source) from exc
    if not (isinstance(kind, type) and issubclass(kind, Plugin)):
        raise wrong(key, f"{name!r}, {which}, is not a Plugin", source)
    within = f"{room}_options"
    return convert(getattr(settings, within), kind, origins.get(within), within=within)


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
        shown = ", ".join(_scheme(each) if room == "sink" else each for each in names)
        wanted = "must begin with one of" if room == "sink" else f"{name!r} is not one of auto,"
        raise wrong(key, f"{wanted} {shown}", source)
    if len(found) > 1:
        which = " and ".join(f"{each.value}{_package(each)}" for each in found)
        raise wrong(key, f"{name!r} is the name of {which}: uninstall one of them", source)
    return found[0]


def _scheme(name: str) -> str:
    return f"{name}:///" if name == "sqlite" else f"{name}://"


def _package(entry: EntryPoint) -> str:
    return f" of {entry.dist.name}" if entry.dist else ""
