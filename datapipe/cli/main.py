"""The commands. Each failure is one clear line: exit 2 for usage and settings, 1 for the rest."""

from __future__ import annotations

import argparse
import asyncio
import os
import pkgutil
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datapipe import settings
from datapipe.cli import configuration
from datapipe.errors import ConfigError, DatapipeError
from datapipe.settings import Settings
from datapipe.version import __version__

Command = Callable[[Settings, argparse.Namespace], Coroutine[Any, Any, int]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    sys.path.append("")  # for `event_modules` in the working folder, as with `python -m`
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        given = configuration.given(args)
        # once more for each reload: variables and options stay as they are now
        args.load = partial(settings.load, **given)
        shows = args.command is configuration.config
        configured = settings.read(**given).settings if shows else settings.load(**given)
        if args.needs and (folder := configuration.require(configured, args.needs)):
            print(f"datapipe: looking in {folder}", file=sys.stderr, flush=True)
        if args.uses_database and settings.plugin(configured, "sink").is_file:
            print(f"datapipe: database {configured.database_url}", file=sys.stderr, flush=True)
            if args.needs == "sink":
                configuration.require_file(configured)
        code: int = _run(args.command(configured, args))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (DatapipeError, OSError) as exc:
        text = str(exc)
        if isinstance(exc, OSError) and exc.filename:
            text = f"{exc.filename}: {exc.strerror}"
        print(f"datapipe: {' '.join(text.split())}", file=sys.stderr)
        return 2 if isinstance(exc, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    return code


def _command(name: str) -> Command:
    """Imported once it is run: each brings much that the others don't need."""

    def run(configured: Settings, args: argparse.Namespace) -> Coroutine[Any, Any, int]:
        command: Command = pkgutil.resolve_name(f"datapipe.cli.{name}")
        return command(configured, args)

    return run


def _run(command: Coroutine[Any, Any, int]) -> int:
    """Run it on uvloop, or, where that is not installed, on asyncio's own, slower loop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(command)
    code: int = uvloop.run(command)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="datapipe",
        description="Takes JSON events by HTTP POST and loads them into a database, each once.",
    )
    parser.add_argument("--version", action="version", version=f"datapipe {__version__}")
    parser.set_defaults(
        command=None, host=None, port=None, database_url=None, uses_database=False, needs=None,
        try_out=False,
    )  # fmt: skip
    _add_config(parser, None)
    sub = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(
        name: str, command: Command, text: str, *, uses_database: bool = True
    ) -> argparse.ArgumentParser:
        made = sub.add_parser(name, help=text, description=text)
        made.set_defaults(command=command)
        _add_config(made)
        if uses_database:
            _add_database(made)
        return made

    serving = add("serve", _command("serve:serve"), "run the service")
    serving.add_argument("--host", help="address to listen on")
    serving.add_argument("--port", type=int, help="port to listen on")
    serving.add_argument("--try-out", action="store_true", help=argparse.SUPPRESS)
    checking = add(
        "check",
        _command("commands:check"),
        "verify the settings, the database and the durable queue",
    )
    checking.add_argument(
        "--release",
        action="store_true",
        help="before a release: what can't be reached is a warning",
    )
    _add_json(checking)
    loading = add("load", _command("commands:load"), "load what dead processes left, once")
    loading.set_defaults(needs="mirror")
    loading.add_argument(
        "--accept-dead",
        action="store_true",
        help="let rows that the database refuses become dead letters",
    )
    looking = add(
        "status", _command("commands:status"), "the page at a glance", uses_database=False
    )
    looking.add_argument(
        "url", nargs="?", metavar="URL", help="of the service (default: this machine's)"
    )
    _add_json(looking)
    _add_send(
        add(
            "send",
            _command("send.command:send"),
            "send files of events to a service",
            uses_database=False,
        )
    )
    text = "the settings in force, and where each came from"
    _add_json(add("config", configuration.config, text, uses_database=False))
    defining = add("schema", _command("commands:schema"), "print the DDL for all event types")
    defining.add_argument(
        "--apply", action="store_true", help="make what is missing, and print only that"
    )
    defining.add_argument(
        "--adopt", metavar="NAME", action="append", default=[],
        help="partition and expire a table that was there before, like our own (PostgreSQL)",
    )  # fmt: skip
    _add_shelf(
        sub, "dead", _command("shelves:dead"), "dead letters: look, put back, remove",
        {
            "list": "count them by reason and show the newest",
            "replay": "check them again and put them back into their tables",
            "drop": "remove them for good",
        },
        {"--lane --type": "only of this event type", "--sqlstate": "only with this SQLSTATE"},
    )  # fmt: skip
    _add_shelf(
        sub, "unknown", _command("shelves:unknown"),
        "kept events of unknown types: look, move, remove",
        {
            "list": "count them by name, with a type that fits them, and show the newest",
            "replay": "check those whose type is registered by now and move them into its table",
            "drop": "remove them for good",
        },
        {"--name": "only of this event_name"},
    )  # fmt: skip
    text = "print the class of a new event type"
    new = add("new-event", _command("commands:new_event"), text, uses_database=False)
    new.add_argument("name", help="the event_name")
    new.add_argument("fields", nargs="*", metavar="field:type", help="e.g. user_id:int plan:str?")
    return parser


def _add_config(parser: argparse.ArgumentParser, default: Any = argparse.SUPPRESS) -> None:
    """Before or after the command: one that is not given there must not undo the other."""
    parser.add_argument(
        "--config", metavar="FILE", type=_file_name, default=default,
        help="the settings file, JSON or TOML; instead of $DATAPIPE_CNF",
    )  # fmt: skip


def _file_name(text: str) -> str:
    if not text:  # of an unset variable: not the same as not given
        raise argparse.ArgumentTypeError("a file must be named")
    return text


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _add_database(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(uses_database=True)
    parser.add_argument(
        "--database-url",
        metavar="URL",
        help="instead of the setting; whoever lists processes sees it",
    )


def _add_send(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE",
        help="NDJSON or a JSON array, plain, gzip or zstd; - for standard input",
    )  # fmt: skip
    parser.add_argument("--url", help="of the service (default: this machine's)")
    parser.add_argument(
        "--id", help="what its keys are made of (default: its path and first 64 KiB)"
    )
    parser.add_argument(
        "--again", action="store_true",
        help="send anew what was sent; go on with what was broken off too long ago",
    )  # fmt: skip
    parser.add_argument("--parallel", type=int, default=4, help="POSTs at a time (default: 4)")
    parser.add_argument(
        "--key-file", type=Path, metavar="PATH",
        help="holds the ingest key (default: the first of the setting ingest_keys)",
    )  # fmt: skip
    parser.add_argument(
        "--state",
        type=Path,
        metavar="PATH",
        help="remembers how far it is (default: FILE.datapipe-sent)",
    )
    parser.add_argument(
        "--refused",
        type=Path,
        metavar="PATH",
        help="takes what is rejected (default: FILE.refused)",
    )


def _add_shelf(
    sub: Any,
    shelf: str,
    command: Command,
    text: str,
    texts: Mapping[str, str],
    selectors: Mapping[str, str],
) -> None:
    """A command over dead letters, or unknown events. Args: texts: of its actions."""
    parser = sub.add_parser(shelf, help=text)
    _add_config(parser)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, text in texts.items():
        made = actions.add_parser(name, help=text, description=text)
        made.set_defaults(command=command, action=name, needs="sink")
        _add_config(made)
        _add_database(made)
        for option, meaning in selectors.items():
            made.add_argument(*option.split(), help=meaning)
        if name == "list":
            made.add_argument(
                "--limit", type=int, default=20, help="how many to show (default: 20)"
            )
            _add_json(made)
        else:
            made.add_argument("--id", type=int, action="append", help="this one; may be repeated")
            made.add_argument("--all", action="store_true", help="all there are")
