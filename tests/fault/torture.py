"""`make torture`: the long fault run; prints the table of docs/torture.md.

    python -m tests.fault.torture [kills] [outage] [bodies] [heads] [nats] [databases] [changes]

Everything happens in a temporary folder. A part that fails ends the run with exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.databases import running
from tests.fault import hostile, pipelines
from tests.fault.changes import change
from tests.fault.kills import crash_many, cut_many, kill_many
from tests.fault.machines import Machines, Pauses
from tests.fault.nats_faults import FAULTS, FAULTS_APART, drawn
from tests.fault.outage import LIMIT_BYTES, outage
from tests.postgres import Postgres
from tests.service import Service

PARTS = ("kills", "outage", "bodies", "heads", "nats", "databases", "changes")
_ROUND = 50  # kills to a database; then all is compared
_FAULTS = 25  # to a cluster and a database
# those after which something waits for `ack_wait`, which the others shrink
_HOLDING = ["a process killed in the middle of COPY", "a process frozen with what it took"]
_ACK_WAIT_S = 30.0
_COUNTED = ("sent", "accepted", "rows", "kept", "dead", "reused", "waited")


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


async def run_kills(make: Callable[..., Service], args: argparse.Namespace) -> list[str]:
    """Rounds of kills, each compared with the tables; the database restarts among them."""
    sums: Counter[str] = Counter()
    postgres, chance = Postgres(fsync="on"), random.Random(args.seed)
    started = time.monotonic()
    try:
        postgres.start()
        while sums["kills"] < args.kills:
            count = min(_ROUND, args.kills - sums["kills"])
            found = await kill_many(postgres, make, chance, count, restart_every=10)
            sums.update({"kills": count, **found})
            _say(f"kills: {dict(sums)}")
    finally:
        postgres.remove()
    minutes = (time.monotonic() - started) / 60
    return [
        f"| kills at random moments under load | {sums['kills']:,} |",
        f"| database restarts among them | {sums['restarts']:,} |",
        f"| events answered 200 | {sums['answered']:,} |",
        f"| of these sent twice under one key, counted once | {sums['duplicates_by_key']:,} |",
        f"| lost | {sums['lost']} |",
        f"| doubled | {sums['doubled']} |",
        f"| looks after a kill that found events unaccounted for | {sums['unbalanced']} |",
        f"| minutes, seed | {minutes:.0f}, {args.seed} |",
    ]


async def run_outage(make: Callable[..., Service], args: argparse.Namespace) -> list[str]:
    """The database away, events coming."""
    postgres = Postgres(fsync="on")
    try:
        postgres.start()
        result = await outage(
            postgres, make, args.minutes * 60, events_a_second=args.rate, batch=args.batch, say=_say
        )
    finally:
        postgres.remove()
    _say(f"outage: {asdict(result)}")
    assert result.rows == result.distinct == result.posted, "lost or doubled"
    return [
        f"| outage | {result.seconds / 60:g} minutes at {result.rate:,.0f} events/s |",
        f"| process limit (RLIMIT_DATA) | {LIMIT_BYTES // 2**20} MiB |",
        f"| events answered 200; rejected | {result.posted:,}; {result.refused} |",
        f"| resident memory early, at the end | "
        f"{result.rss_start_mb:.0f}, {result.rss_end_mb:.0f} MB |",
        f"| peak, loading included | {result.peak_mb:.0f} MB |",
        f"| waiting in the journal at the end | {result.journal_mb:.0f} MB |",
        f"| slowest answer | {result.slowest_answer_s:.2f} s |",
        f"| all loaded, once, after the database was back | {result.loaded_in_s:.1f} s |",
    ]


async def run_bodies(make: Callable[..., Service], args: argparse.Namespace) -> list[str]:
    """Hostile bodies in a service of this process."""
    postgres, started = Postgres(), time.monotonic()
    try:
        postgres.start()
        found = await asyncio.to_thread(hostile.run, postgres, args.bodies, args.seed)
    finally:
        postgres.remove()
    _say(f"bodies: {asdict(found)}")
    answered = ", ".join(f"{status}: {n:,}" for status, n in sorted(found.statuses.items()))
    return [
        f"| hostile bodies | {found.bodies:,} |",
        f"| answers | {answered} |",
        "| answers of 5xx | 0 |",
        f"| good events beside them, all loaded | {found.good:,} |",
        f"| accepted events that the table then refused | {found.dead} |",
        f"| minutes, seed | {(time.monotonic() - started) / 60:.0f}, {args.seed} |",
    ]


async def run_heads(make: Callable[..., Service], args: argparse.Namespace) -> list[str]:
    """Pipelines over both ways in, in services of this process."""
    started = time.monotonic()
    found = await asyncio.to_thread(pipelines.run, args.seconds, args.seed)
    _say(f"heads: {found}")
    answered = ", ".join(f"{status}: {n:,}" for status, n in sorted(found.answers.items()))
    return [
        f"| pipelines, over both ways in | {found.pipelines:,} |",
        f"| answers, the same from both | {answered} |",
        f"| events answered 200 or 207, all accounted for | {found.accepted:,} |",
        "| answers of 5xx, errors logged | 0 |",
        f"| minutes, seed | {(time.monotonic() - started) / 60:.0f}, {args.seed} |",
    ]


async def run_nats(make: Callable[..., Service], args: argparse.Namespace) -> list[str]:
    """Faults of processes, nodes, networks and the database, each compared with the tables."""
    chance, faults = random.Random(args.seed), FAULTS | FAULTS_APART
    names = drawn(chance, args.faults, faults)
    pauses: dict[str, list[Pauses]] = {}
    statuses: Counter[int] = Counter()
    sums: Counter[str] = Counter()
    leaderless: list[str] = []
    done = 0
    started = time.monotonic()
    rounds: list[tuple[list[str], dict[str, Any], str]] = [
        (names[at:][:_FAULTS], {"apart": True}, "") for at in range(0, len(names), _FAULTS)
    ]
    rounds.append((_HOLDING, {"ack_wait_s": _ACK_WAIT_S}, f", with {_ACK_WAIT_S:g} s"))
    count = itertools.count(1)
    for some, options, note in rounds:
        folder = Path(tempfile.mkdtemp(prefix="datapipe-torture-nats-", dir="/var/tmp"))
        postgres = Postgres(fsync="on")
        try:
            postgres.start()
            async with Machines.running(folder, postgres, make, chance, **options) as machines:
                for name in some:
                    try:
                        found = await machines.round(faults[name])
                    except Exception:
                        if not machines.leaderless():
                            raise
                        leaderless.append(name)  # what waits there can't be had any more
                        _say(f"nats: given up after {name}: a stream without a leader")
                        break
                    pauses.setdefault(f"{name}{note}", []).append(found)
                    _say(f"nats: {next(count)} {name}{note}: {found}")
                    done += 1
                else:
                    verdict = await machines.check()
                    sums.update(answered=verdict.answered, again=verdict.duplicates_by_key)
                for service in machines.services:
                    await service.kill()
        finally:
            postgres.remove()
        shutil.rmtree(folder)  # left there if something failed
        statuses.update(machines.driver.statuses)
    return [
        f"| faults | {done} |",
        f"| events answered 200 | {sums['answered']:,} |",
        f"| clusters given up, as the servers left a stream without a leader | {len(leaderless)} |",
        f"| of these sent twice under one key, counted once | {sums['again']:,} |",
        f"| answers | {', '.join(f'{code}: {n:,}' for code, n in sorted(statuses.items()))} |",
        "| lost, doubled, damaged, unaccounted for | 0 |",
        f"| minutes, seed | {(time.monotonic() - started) / 60:.0f}, {args.seed} |",
        "",
        "| seconds, median and worst | times | until a POST is answered 200 | between two loads |"
        " until all is loaded |",
        "| --- | --- | --- | --- | --- |",
        *(_row(*each) for each in sorted(pauses.items())),
    ]


def _row(name: str, pauses: list[Pauses]) -> str:
    columns = [
        f"{statistics.median(values):.1f}, {max(values):.1f}"
        for values in (
            [each.post_s for each in pauses],
            [each.load_s for each in pauses],
            [each.settle_s for each in pauses],
        )
    ]
    return f"| {name} | {len(pauses)} | {' | '.join(columns)} |"


async def run_databases(make: Callable[..., Service], args: argparse.Namespace) -> list[str]:
    """Kills of services and servers; SQLite has none, so its services die twice as often."""
    chance = random.Random(args.seed)
    started = time.monotonic()
    n = args.each
    pair = {"services": 2}
    kinds: list[tuple[str, str, Callable[..., Any], int, dict[str, int]]] = [
        ("mariadb", "MariaDB: the service is killed", kill_many, n, {}),
        ("mariadb", "MariaDB: one of two is killed", kill_many, n, pair | {"restart_every": 5}),
        ("mariadb", "MariaDB: the server is killed", crash_many, n, {}),
        ("mariadb", "MariaDB: the connection breaks", cut_many, n, {}),
        ("sqlite", "SQLite: the service is killed", kill_many, 2 * n, {}),
        ("sqlite", "SQLite: one of two is killed", kill_many, 2 * n, pair),
        ("sqlite", "SQLite: the file's folder is away", crash_many, n, {}),
        ("sqlite", "SQLite: the disk fails", cut_many, n, {}),
    ]
    lines = []
    for kind, name, work, count, options in kinds:
        with running(kind) as server:
            found = await work(server, make, chance, count, **options)
        _say(f"databases: {name}: {found}")
        columns = ("kills", "accepted", "rows", "distinct", "dead", "lost", "doubled")
        lines.append(f"| {name} | {' | '.join(f'{found[each]:,}' for each in columns)} |")
    return [
        f"| minutes, seed | {(time.monotonic() - started) / 60:.0f}, {args.seed} |",
        "",
        "| what fails | times | accepted | rows | distinct | dead letters | lost | doubled |",
        f"|{' --- |' * 8}",
        *lines,
    ]


async def run_changes(make: Callable[..., Service], args: argparse.Namespace) -> list[str]:
    """Keys used twice, POSTs that wait, types, settings and ingest keys that change, kills."""
    postgres, started = Postgres(fsync="on"), time.monotonic()
    sums: Counter[str] = Counter()
    chance = random.Random(args.seed)
    try:
        postgres.start()
        while sums["changes"] < args.changes:
            count = min(_FAULTS, args.changes - sums["changes"])
            found = await change(postgres.create_database(), make, chance, count)
            found.check()
            sums.update({"changes": count, **{name: getattr(found, name) for name in _COUNTED}})
            _say(f"changes: {dict(sums)}")
    finally:
        postgres.remove()
    return [
        f"| restarts with other settings, reloads with other ingest keys, kills | "
        f"{sums['changes']:,} |",
        f"| events sent; accepted at some try | {sums['sent']:,}; {sums['accepted']:,} |",
        f"| keys used with another body; POSTs answered as loaded | "
        f"{sums['reused']:,}; {sums['waited']:,} |",
        f"| rows; kept as unknown; dead letters | "
        f"{sums['rows']:,}; {sums['kept']:,}; {sums['dead']:,} |",
        "| lost, doubled, stored though rejected, answered as loaded and not there | 0 |",
        f"| minutes, seed | {(time.monotonic() - started) / 60:.0f}, {args.seed} |",
    ]


async def run(args: argparse.Namespace) -> int:
    folder = Path(tempfile.mkdtemp(prefix="datapipe-torture-", dir="/var/tmp"))
    made: list[Service] = []

    def make(**settings: Any) -> Service:
        home = folder / str(len(made))
        home.mkdir()
        made.append(Service(home, **settings))
        return made[-1]

    runs = {
        "kills": run_kills, "outage": run_outage, "bodies": run_bodies, "heads": run_heads,
        "nats": run_nats, "databases": run_databases, "changes": run_changes,
    }  # fmt: skip
    try:
        for part in args.parts or PARTS:
            lines = await runs[part](make, args)
            print("\n".join([f"\n| {part} | |", "| --- | --- |", *lines]), flush=True)
    finally:
        for service in made:
            if service._process is not None and service._process.returncode is None:
                await service.kill()
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fault.torture", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=30, help="of the outage")
    parser.add_argument("--rate", type=int, default=2000, help="events a second in the outage")
    parser.add_argument("--batch", type=int, default=100, help="events of every second POST there")
    parser.add_argument("--bodies", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=60, help="of the heads, at least")
    parser.add_argument("--faults", type=int, default=300, help="of the part nats")
    parser.add_argument("--each", type=int, default=20, help="kills of each kind in the databases")
    parser.add_argument("--changes", type=int, default=200, help="of settings, keys and processes")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}")
    return asyncio.run(run(args))


if __name__ == "__main__":
    sys.exit(main())
