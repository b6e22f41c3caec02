"""`datapipe unknown`: kept events of unknown types."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from datapipe import logs
from datapipe.cli.terminal import print_json, printable
from datapipe.errors import ConfigError, EventRejected, LaneBlocked, SinkUnavailable
from datapipe.events.registry import Registry, load_registry
from datapipe.pipeline.coordinator import new_process_id
from datapipe.pipeline.dead_letters import DeadLetters
from datapipe.pipeline.unknown import ALL, Unknown, said, selection_of
from datapipe.settings import Settings
from datapipe.sinks import Database, open_sink

_NAMED = 10  # by `check`


async def unknown(settings: Settings, args: argparse.Namespace) -> int:
    """List, replay, drop; 1 if some are refused, or of those that were named some are left."""
    logs.configure("warning", settings.log_format)
    async with open_sink(settings, new_process_id()) as sink:
        registry = load_registry(settings)
        events = Unknown(sink, registry, DeadLetters(sink, registry))
        if args.action == "list":
            found = await events.look(replace(ALL, lane=args.name), args.limit)
            (print_json if args.json else _print_events)(found)
            return 0
        wanted = {"ids": args.id, "event_name": args.name, "all": args.all or None}
        try:
            selection = selection_of({k: v for k, v in wanted.items() if v is not None})
        except EventRejected:
            raise ConfigError("say which: --id N, --name NAME, or --all") from None
        if args.action == "drop":
            print(f"dropped: {(await events.drop(selection))['dropped']}")
            return 0
        result = await events.replay(selection)
    for lane, rows in sorted(result["replayed"].items()):
        print(f"replayed {lane}: {rows} rows")
    print(f"refused: {result['refused']}")
    print(f"still unknown: {result['unknown'] - result['refused']}")
    return int(result["refused"] or (result["unknown"] and not args.all))


async def findings(sink: Database, registry: Registry) -> list[tuple[str, str]]:
    """What lies there, for `check`; nothing if the database does not answer, which it has said."""
    try:
        groups = (await sink.find(ALL, 0))["groups"] if sink.state().up is not False else []
    except (SinkUnavailable, LaneBlocked):
        return []
    waiting = [group for group in groups if group["event_name"] not in registry.types]
    said = []
    if waiting:
        count = sum(group["count"] for group in waiting)
        names = ", ".join(f"{each['event_name']} ({each['count']:,})" for each in waiting[:_NAMED])
        more = f" and {len(waiting) - _NAMED:,} other names" if len(waiting) > _NAMED else ""
        text = f"{count:,} are kept: {names}{more}; see datapipe unknown list"
        said.append(("ok", f"unknown events: {text}"))
    for group in groups:
        if (name := group["event_name"]) in registry.types:
            text = "whose type is registered by now: datapipe unknown replay moves them"
            said.append(("warn", f"unknown events: {group['count']:,} of {name}, {text}"))
    return said


def _print_events(found: dict[str, Any]) -> None:
    for group in found["groups"]:
        print(printable(said(group)))
    for event in found["letters"]:
        print(f"#{event['id']}  {event['received_at']:%Y-%m-%d %H:%M:%S}  {event['event_name']}")
        if event["message"]:
            print(f"    {printable(event['message'])}")
        print(f"    {printable(bytes(event['event']).decode())}")
    print(f"total: {found['total']}")
