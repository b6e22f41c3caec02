"""`datapipe dead`, `datapipe unknown`: accepted events that are in no table of their type."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from datapipe import logs
from datapipe.cli.terminal import print_json, printable
from datapipe.errors import ConfigError, EventRejected
from datapipe.events.registry import load_registry
from datapipe.pipeline import dead_letters
from datapipe.pipeline import unknown as unknown_events
from datapipe.pipeline.coordinator import new_process_id
from datapipe.pipeline.dead_letters import DeadLetters
from datapipe.pipeline.unknown import ALL, Unknown
from datapipe.settings import Settings
from datapipe.sinks import Selection, open_sink


async def dead(settings: Settings, args: argparse.Namespace) -> int:
    """Dead letters: list, replay, drop; 1 if some of those replayed are refused again."""
    logs.configure("critical", settings.log_format)  # what is printed is all that is said
    async with open_sink(settings, new_process_id()) as sink:
        letters = DeadLetters(sink, load_registry(settings))
        if args.action == "list":
            found = await letters.look(
                Selection(lane=args.lane, sqlstate=args.sqlstate), args.limit
            )
            (print_json if args.json else _print_letters)(found)
            return 0
        selection = _selected(
            dead_letters.selection_of, args, "--type T, --sqlstate S",
            lane=args.lane, sqlstate=args.sqlstate,
        )  # fmt: skip
        if args.action == "drop":
            print(f"dropped: {(await letters.drop(selection))['dropped']}")
            return 0
        result = await letters.replay(selection)
    _print_replayed(result)
    if not result["replayed"] and not result["dead"]:
        _note("no dead letter is among these; `datapipe dead list` shows which there are")
    print(f"still dead: {result['dead']}")
    return 1 if result["dead"] else 0


async def unknown(settings: Settings, args: argparse.Namespace) -> int:
    """Kept events of unknown types: list, replay, drop; 1 if some are refused, or of those that
    were named some are left.
    """
    logs.configure("critical", settings.log_format)
    async with open_sink(settings, new_process_id()) as sink:
        registry = load_registry(settings)
        events = Unknown(sink, registry, DeadLetters(sink, registry))
        if args.action == "list":
            found = await events.look(replace(ALL, lane=args.name), args.limit)
            (print_json if args.json else _print_events)(found)
            return 0
        selection = _selected(
            unknown_events.selection_of, args, "--name NAME", event_name=args.name
        )
        if args.action == "drop":
            print(f"dropped: {(await events.drop(selection))['dropped']}")
            return 0
        result = await events.replay(selection)
    _print_replayed(result)
    print(f"refused: {result['refused']}")
    if still := result["unknown"] - result["refused"]:
        _note("these settings (--config) do not have the types; `datapipe unknown list` names them")
    print(f"still unknown: {still}")
    return int(result["refused"] or (result["unknown"] and not args.all))


def _selected(
    select: Callable[[Any], Selection], args: argparse.Namespace, options: str, **by: str | None
) -> Selection:
    """What the options name. Raises: ConfigError: nothing, or too much. Args: options: usage."""
    wanted = {"ids": args.id, "all": args.all or None, **by}
    try:
        return select({key: value for key, value in wanted.items() if value is not None})
    except EventRejected:
        raise ConfigError(f"say which: --id N, {options}, or --all") from None


def _note(text: str) -> None:
    """On stderr, beside what a program reads."""
    print(f"datapipe: {text}", file=sys.stderr, flush=True)


def _print_replayed(result: Mapping[str, Any]) -> None:
    for lane, rows in sorted(result["replayed"].items()):
        print(f"replayed {lane}: {rows} rows")


def _print_letters(found: dict[str, Any]) -> None:
    for group in found["groups"]:
        state = group["sqlstate"] or "-"
        print(f"{group['count']:>8}  {group['lane']}  {state}  {group['message']}")
    for letter in found["letters"]:
        event = bytes(letter["event"]).decode()
        print(f"#{letter['id']}  {letter['created_at']:%Y-%m-%d %H:%M:%S}  {letter['lane']}")
        print(f"    {letter['sqlstate'] or '-'}: {letter['message']}")
        print(f"    {event}")
    print(f"total: {found['total']}")


def _print_events(found: dict[str, Any]) -> None:
    for group in found["groups"]:
        print(printable(unknown_events.said(group)))
    for event in found["letters"]:
        print(f"#{event['id']}  {event['received_at']:%Y-%m-%d %H:%M:%S}  {event['event_name']}")
        if event["message"]:
            print(f"    {printable(event['message'])}")
        print(f"    {printable(bytes(event['event']).decode())}")
    print(f"total: {found['total']}")
