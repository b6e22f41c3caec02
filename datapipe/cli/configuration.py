"""What the command line says of the settings, and `datapipe config`, which shows them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import msgspec

from datapipe import settings
from datapipe.cli.terminal import print_json
from datapipe.errors import DatapipeError
from datapipe.settings import Settings
from datapipe.sinks.urls import file_path

# Defaults of `make run`: loads soon enough to be watched, reachable from this machine alone.
_RUN_DEFAULTS = {"host": "127.0.0.1", "load_interval": 5.0, "load_min_interval": 1.0}


def given(args: argparse.Namespace) -> dict[str, Any]:
    """What `settings.load` and `settings.read` are to read, each time they are called."""
    named = {settings.FILE_VARIABLE: args.config} if args.config else {}
    return {
        "options": {"host": args.host, "port": args.port, "database_url": args.database_url},
        "environ": os.environ | named,
        "run_defaults": _RUN_DEFAULTS if args.try_out else None,
    }


def require(configured: Settings, room: settings.Room) -> Path | None:
    """The folder of this mirror or sink in `data_dir`, if it has one: no command makes it.

    Raises: DatapipeError: it is not there.
    """
    found: settings.Plugin = settings.plugin(configured, room)
    folder = found.kept_in(configured)
    if folder and not folder.is_dir():
        raise DatapipeError(
            f"{folder} is not there: no service has run with this data_dir; `datapipe config` "
            "shows where it was set"
        )
    return folder


def require_file(configured: Settings) -> None:
    """Where the database is a file: what looks into it does not make it.

    Raises: DatapipeError: it is not there.
    """
    file = file_path(configured.database_url)
    if not file.exists():
        raise DatapipeError(
            f"{file} is not there: nothing was loaded yet; `datapipe config` shows where "
            "database_url was set"
        )


async def config(configured: Settings, args: argparse.Namespace) -> int:
    """Print the settings in force and where each came from; secrets are hidden."""
    shown = settings.shown(configured)
    sources = dict.fromkeys(shown, "default") | settings.read(**given(args)).sources
    if args.json:
        print_json({k: {"value": value, "source": sources[k]} for k, value in shown.items()})
        return 0
    told = {key: _told(configured, key, value) for key, value in shown.items()}
    widths = max(map(len, told)), min(max(map(len, told.values())), 40)
    for key, text in told.items():
        print(f"{key:<{widths[0]}}  {text:<{widths[1]}}  {sources[key]}")
    return 0


def _told(configured: Settings, key: str, value: Any) -> str:
    """As the settings file has it, and what it means."""
    text = msgspec.json.encode(value).decode()
    if key == "mirror" and value != configured.mirror_kind:
        return f"{text} ({configured.mirror_kind})"
    if key == "database_url" and not value and (folder := _embedded(configured)):
        return f"{text} (embedded PostgreSQL in {folder})"
    return text


def _embedded(configured: Settings) -> Path | None:
    found: settings.Plugin = settings.plugin(configured, "sink")
    return found.kept_in(configured)
