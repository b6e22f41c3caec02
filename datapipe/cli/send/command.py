"""`datapipe send FILE...`: what is asked for, what is remembered, what is said."""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from yarl import URL

from datapipe.cli.send.client import Client
from datapipe.cli.send.cut import Mark
from datapipe.cli.send.sending import Sending, Totals
from datapipe.cli.send.source import Source
from datapipe.cli.send.state import RefusedFile, State, StateFile, fingerprint
from datapipe.errors import ConfigError, DatapipeError
from datapipe.monitor import formats
from datapipe.settings import Settings

_SHOW_S = 0.2


async def send(settings: Settings, args: argparse.Namespace) -> int:
    """Send files of events; 1 if some were refused, or it was stopped.

    Raises: ConfigError, DatapipeError, OSError.
    """
    if len(args.files) > 1 and (args.id or args.state or args.refused):
        raise ConfigError("--id, --state and --refused are for one FILE")
    if args.parallel < 1:
        raise ConfigError("--parallel: at least 1")
    work = asyncio.create_task(_send_all(settings, args))
    loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, work.cancel)
    try:
        return await work
    except asyncio.CancelledError:
        print("datapipe: stopped; the same command goes on from here", file=sys.stderr)
        return 1
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _send_all(settings: Settings, args: argparse.Namespace) -> int:
    url = _checked_url(args.url or f"http://127.0.0.1:{settings.port}")
    key = _key_of(args.key_file) if args.key_file else _first_key(settings)
    changed, totals, started = asyncio.Event(), Totals(), time.monotonic()
    unsent, ended = 0, False
    try:
        async with Client(url, key, args.parallel, changed.set) as client:
            for name in args.files:
                source = Source(name)
                try:
                    unsent += await _send_one(source, client, settings, args, totals, changed)
                finally:
                    source.close()
        ended = True
    finally:
        if ended or totals.any():  # an option that is wrong is said alone
            _print_summary(totals, time.monotonic() - started)
    return 1 if unsent or totals.refused else 0


def _checked_url(text: str) -> str:
    """Where to post, as state files and messages may show it.

    Raises: ConfigError: it is no URL, or more than that of a service.
    """
    text = text.rstrip("/")
    try:
        url = URL(text if text.endswith("/v1/events") else f"{text}/")
    except ValueError:
        url = URL()
    if url.raw_user or url.raw_password or url.raw_query_string or url.raw_fragment:
        raise ConfigError(
            "--url: must be http://HOST:PORT, without a login and without what follows a ? or a #; "
            "a key comes from --key-file or the setting ingest_keys"
        )
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"--url: {text} is not a URL like http://HOST:PORT")
    return str(url)


async def _send_one(
    source: Source,
    client: Client,
    settings: Settings,
    args: argparse.Namespace,
    totals: Totals,
    changed: asyncio.Event,
) -> int:
    """Send one input; how many of its lines are left for the next time."""
    if not source.again and not args.id:
        raise ConfigError(f"{source.name} can be read only once: name it by --id")
    file = StateFile(_state_path(source, args.state))
    state = _state(source, file, client.url, settings, args)
    anew = state.reached == Mark()
    path = args.refused or Path(f"{source.name if source.again else _as_name(args.id)}.refused")
    refused = RefusedFile(path, anew=anew, since=state.done.item + 1)
    accepted, before = totals.accepted, totals.refused.total()
    sending = Sending(source, client, state, file, refused, totals, args.parallel, changed)
    try:
        async with _shown(source, client, totals):
            await sending.run()
    finally:
        refused.close()
        if (count := totals.refused.total() - before) > 0:
            print(f"{source.name}: {count:,} rejected, see {path}", file=sys.stderr)
    if sending.rest:
        why = "its last line is incomplete: left for the next time"
        print(f"{source.name}: {why}", file=sys.stderr)
    elif not anew and not count and totals.accepted == accepted:
        why = "nothing new since it was sent; --again sends it again"
        print(f"{source.name}: {why}", file=sys.stderr)
    return bool(sending.rest)


def _as_name(id: str) -> str:
    """As a file in the working folder may be called."""
    return re.sub(r"[^\w.-]", "_", id)


def _state_path(source: Source, named: Path | None) -> Path | None:
    if named or not source.again:
        return named
    return Path(f"{source.name}.datapipe-sent")


def _state(
    source: Source, file: StateFile, url: str, settings: Settings, args: argparse.Namespace
) -> State:
    """Where to go on. Raises: DatapipeError: that is not sure to send each event once."""
    head = fingerprint(source.head)
    made_id = args.id or fingerprint(f"{source.name}\0{head}".encode(errors="surrogateescape"))
    now = datetime.now(UTC)
    new = State(made_id, url, head, len(source.head), now, Mark(), Mark())
    old = file.read()
    if old is None or fingerprint(source.head[: old.head_bytes]) != old.head:
        return new  # another file has taken its name
    if args.id and args.id != old.id:
        raise DatapipeError(f"{file.path} is of --id {old.id}: name another by --state")
    new.id, new.cuts = old.id, old.cuts
    if old.url != url:
        if args.again or old.reached == Mark():
            return new
        raise DatapipeError(
            f"{source.name} was sent to {old.url} ({file.path}): to send it to {url} as well, "
            "name another --state; if the service has moved, --again sends it anew"
        )
    if old.whole and args.again:
        return new
    age_s = (now - old.advanced_at).total_seconds()
    if age_s > settings.dedupe_window and not (old.whole or args.again):
        window = formats.seconds(settings.dedupe_window)
        raise DatapipeError(
            f"{source.name} was broken off {formats.seconds(age_s)} ago, and a key is known for "
            f"{window} (dedupe_window): lines {old.done.item + 1:,} to {old.reached.item:,} may be "
            "loaded already, and would be a second time; --again sends them all the same"
        )
    if old.whole or args.again:
        old.advanced_at = now
    return old


def _key_of(path: Path) -> str:
    """The ingest key that a file holds. Raises: OSError; ConfigError: it holds something else."""
    try:
        key = path.read_bytes().decode().strip()
    except UnicodeDecodeError:
        key = ""
    if not key or not key.isprintable():
        raise ConfigError(f"--key-file: {path} must hold one key, on one line")
    return key


def _first_key(settings: Settings) -> str:
    """The first of the setting `ingest_keys`; empty if there is none."""
    first: Any = settings.ingest_keys[0] if settings.ingest_keys else ""
    return first if isinstance(first, str) else str(first.key)


def _print_summary(totals: Totals, seconds: float) -> None:
    refused = totals.refused.total()
    sent = totals.accepted + refused
    why = ", ".join(f"{reason} {count:,}" for reason, count in sorted((+totals.refused).items()))
    print(
        f"sent {sent:,}: {totals.accepted:,} accepted, {refused:,} rejected"
        f"{f' ({why})' if why else ''}; {seconds:.1f} s, {sent / seconds:,.0f} events/s"
    )


@asynccontextmanager
async def _shown(source: Source, client: Client, totals: Totals) -> AsyncIterator[None]:
    """Show how far it is, as long as the block lasts: a bar on a terminal, else troubles alone."""
    show = _bar(source, client, totals) if sys.stderr.isatty() else _troubles(client)

    async def repeat() -> None:
        while True:
            await asyncio.sleep(_SHOW_S)
            show(False)

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        task.cancel()
        show(True)


def _bar(source: Source, client: Client, totals: Totals) -> Callable[[bool], None]:
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread that looks after slow bars
    bar: Any = tqdm(total=source.size, unit="B", unit_scale=True, unit_divisor=1024)

    def show(last: bool) -> None:
        full = sorted({piece.lane for piece in client.waiting})
        why = client.trouble or (f"no room for {', '.join(full)}" if full else "")
        sent = totals.accepted + totals.refused.total()
        bar.n = source.taken
        bar.set_postfix_str(f"{sent:,} events{why and f'; {why}'}", refresh=True)
        if last:
            bar.close()

    return show


def _troubles(client: Client) -> Callable[[bool], None]:
    said = ""

    def show(last: bool) -> None:
        nonlocal said
        if client.trouble != said:
            said = client.trouble
            if said:
                print(f"datapipe: {said}; trying again", file=sys.stderr, flush=True)

    return show
