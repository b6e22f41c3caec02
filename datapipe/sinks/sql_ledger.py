"""The ledger and the heartbeats in SQL: see `sinks.Ledger`, `sinks.Heartbeats`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from uuid import uuid4

from datapipe.settings import Settings
from datapipe.sinks import Beat, Heartbeat, Mark
from datapipe.sinks.dialect import OWN_TABLES, Dialect
from datapipe.sinks.sql_tables import SqlTables, Statement
from datapipe.sinks.sql_transaction import sliced
from datapipe.sinks.transaction import RENEWED_S

_HOUR_S = 3600.0
# An IronMQ message lives 30 days at the most, so its segment's ledger row must live longer.
_IRONMQ_S = 31 * 24 * _HOUR_S

# What others wait for is known by their last heartbeat, which may be some seconds old.
_BEAT_SLACK_S = 15.0

# Each of those that share a mirror shows the oldest that waits for them all, so one that another of
# them has outlived by so long says nothing any more. The last one seen does: what their mirror
# holds may come back with it.
_OUTLIVED_S = 60.0

_UNKNOWN_AGE_S = 1e9  # before anything that a ledger holds


class _Process(NamedTuple):
    """A row of `datapipe_processes`; times are Unix times by the database's clock, as is `now`."""

    process: str
    mirror: str
    seen: float
    oldest: float | None
    now: float

    @property
    def group(self) -> str:
        return self.mirror.rpartition(":")[0]


class SqlLedger(SqlTables):
    """Remembers what was loaded, and who lives."""

    def __init__(self, dialect: Dialect, settings: Settings, process: str) -> None:
        super().__init__(dialect, settings, process)
        self._dedupe_window_s = settings.dedupe_window
        self._mark_of = f"SELECT body, events FROM {self._ledger} WHERE segment = %s"

    # --- ledger ---

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        """See `Ledger.loaded`."""
        await self.prepare(OWN_TABLES[0])
        sql = f"SELECT segment FROM {self._ledger} WHERE segment {self._one_of}"
        known: set[str] = set()
        for some in sliced(segments):
            known |= {id for (id,) in await self.query(sql, self._dialect.listed(some))}
        return known

    async def expire(self, removed: Sequence[str]) -> None:
        """See `Ledger.expire`."""
        d = self._dialect
        await self.prepare(OWN_TABLES[0])
        seen, oldest, now = (d.epoch.format(each) for each in ("seen_at", "oldest_waiting", d.now))
        sql = f"SELECT process, coalesce(mirror, ''), {seen}, {oldest}, {now} FROM "
        processes = [_Process(*row) for row in await self.query(f"{sql}{self._processes}")]
        outlived_s = _outlived(processes)
        # also what waits in the mirror of a process that is dead: it could hold the same event
        waiting_s = [
            each.now - each.oldest
            for each in processes
            if each.oldest is not None and outlived_s[each.process] < _OUTLIVED_S
        ]
        keys_s = self._dedupe_window_s + _BEAT_SLACK_S + max([0.0, *waiting_s])
        # before what was seen waiting, however much later the DELETE comes
        keys_until = max((each.now for each in processes), default=0.0) - keys_s
        gone = [
            each.process
            for each in processes
            if each.now - each.seen > (_HOUR_S if each.oldest is None else _IRONMQ_S)
            or outlived_s[each.process] > _HOUR_S
        ]
        await self.forget(
            *((f"segment {self._one_of}", (d.listed(some),)) for some in sliced(removed)),
            (f"kind = 'part' AND loaded_at < {d.at.format('%s')}", (keys_until,)),
            (f"kind = 'claim' AND loaded_at < {d.at.format('%s')}", (keys_until - RENEWED_S,)),
            (
                f"kind = 'segment' AND source = 'ironmq' AND loaded_at < {d.ago()}",
                (_IRONMQ_S,),
            ),
        )
        if gone:
            await self._own(
                (
                    f"DELETE FROM {self._processes} WHERE process {self._one_of}"
                    f" AND seen_at < {d.ago()}",  # it may have come back since we looked
                    (d.listed(gone), _HOUR_S),
                )
            )

    async def forget(self, *conditions: Statement) -> None:
        """Delete those rows of the ledger; not those of transactions under way.

        Raises: SinkUnavailable, LaneBlocked.
        """
        await self._own(
            *((f"DELETE FROM {self._ledger} WHERE {sql}", values) for sql, values in conditions)
        )

    async def expire_source(self, source: str, process: str) -> None:
        """See `Ledger.expire_source`."""
        of_others = "= %s AND process <> %s"
        await self.forget((f"source {of_others}", (source, process)))
        await self._own(
            (f"DELETE FROM {self._processes} WHERE mirror {of_others}", (source, process))
        )

    async def expire_lanes(self, source: str, before: Mapping[str, float]) -> None:
        """See `Ledger.expire_lanes`."""
        sql = (
            "kind = 'segment' AND source = %s AND lane = %s"
            f" AND loaded_at < {self._dialect.at.format('%s')}"
        )
        if before:
            await self.forget(*((sql, (source, lane, at)) for lane, at in before.items()))

    async def now(self) -> float:
        """See `Ledger.now`."""
        await self.prepare(OWN_TABLES[0])
        ((now,),) = await self.query(f"SELECT {self._dialect.epoch.format(self._dialect.clock)}")
        return float(now)

    async def find_mark(self, prefix: str) -> Mark | None:
        """See `Ledger.find_mark`."""
        if await self.columns("datapipe_ledger") is None:
            return None
        rows = await self.query(self._mark_of, f"cluster:{prefix}")
        return Mark(rows[0][0], rows[0][1] == 1) if rows else None

    async def mark(self, prefix: str) -> Mark:
        """See `Ledger.mark`."""
        ((id, confirmed),) = (
            await self._own(
                (
                    f"INSERT INTO {self._ledger} (segment, kind, body, process)"
                    f" VALUES (%s, 'cluster', %s, %s)"
                    f" {self._dialect.unless_there.format('segment')}",
                    (f"cluster:{prefix}", uuid4().hex, self._process),
                ),
                (self._mark_of, (f"cluster:{prefix}",)),
            )
        ).rows
        return Mark(id, confirmed == 1)

    async def confirm_mark(self, prefix: str, id: str) -> None:
        """See `Ledger.confirm_mark`."""
        sql = f"UPDATE {self._ledger} SET events = 1 WHERE segment = %s AND body = %s"
        await self._own((sql, (f"cluster:{prefix}", id)))

    # --- heartbeats ---

    async def heartbeat(self, beat: Heartbeat) -> dict[str, Beat]:
        """See `Heartbeats.heartbeat`."""
        d = self._dialect
        mirror = f"{beat.group}:{beat.mirror}" if beat.group else beat.mirror
        age_s = None if beat.oldest_s is None else min(beat.oldest_s, _UNKNOWN_AGE_S)
        began = time.perf_counter()
        result = await self._own(
            (
                f"INSERT INTO {self._processes} (process, mirror, host) VALUES (%s, %s, %s)"
                f" {d.unless_there.format('process')}",
                (beat.process, mirror, beat.host),
            ),
            (
                f"UPDATE {self._processes} SET seen_at = {d.now}, beats = beats + 1, ended = %s,"
                f" oldest_waiting = {d.ago()} WHERE process = %s",
                (beat.ended, age_s, beat.process),
            ),
            (
                f"DELETE FROM {self._processes} WHERE mirror = %s AND process <> %s",
                (mirror, beat.process),
            ),
            (f"SELECT process, beats, ended, host, mirror FROM {self._processes}", ()),
        )
        self.works(began)
        return {
            process: Beat(beats, bool(ended), host or "", (mirror or "").rpartition(":")[0])
            for process, beats, ended, host, mirror in result.rows
        }


def _outlived(processes: Sequence[_Process]) -> dict[str, float]:
    """By how long another process of the same group was seen later, in seconds; without a group 0,
    as for the last one of it.
    """
    last: dict[str, float] = {}
    for each in processes:
        last[each.group] = max(each.seen, last.get(each.group, each.seen))
    return {each.process: last[each.group] - each.seen if each.group else 0.0 for each in processes}
