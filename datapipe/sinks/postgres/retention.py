"""What is older than its retention: found, told beforehand, and removed by small steps.

A step is one transaction, so whoever dies between two of them leaves nothing that the next one
would not find. Of a partitioned table a partition is detached, then dropped by another step, which
knows it by its comment: DETACH CONCURRENTLY would hold up no load, but can't be part of a
transaction. A plain DETACH locks the table, as whoever reads it for long makes it wait: and behind
it all loads. So it waits for a second and tries again later. Rows of any other table are deleted.

One process at a time does it, by a lock that ends with the transaction: session locks are lost
behind a pooler.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import structlog

from datapipe.errors import LaneBlocked, SinkUnavailable
from datapipe.sinks import Table
from datapipe.sinks.postgres.dialect import MARK, PostgresDialect
from datapipe.sinks.postgres.partitions import Partitions, Run, State, look, moment
from datapipe.sinks.server import fetch

STEP_ROWS = 1000  # deleted in one transaction

_CANCELLED = "57014"

# A detached partition of that table: to be found by whoever comes next, or by a person.
_DETACHED = """
    SELECT nspname::text, relname::text FROM pg_description
        JOIN pg_class c ON c.oid = objoid JOIN pg_namespace n ON n.oid = relnamespace
    WHERE classoid = 'pg_class'::regclass AND objsubid = 0 AND description = %s
        AND NOT relispartition AND relkind IN ('r', 'p')
"""

# What keeps a relation from being dropped: views, by their rules, and keys of other tables.
_DEPENDENT = """
    SELECT DISTINCT coalesce(rule.ev_class, key.conrelid)::regclass::text FROM pg_depend
        LEFT JOIN pg_rewrite rule ON classid = 'pg_rewrite'::regclass AND rule.oid = objid
        LEFT JOIN pg_constraint key ON classid = 'pg_constraint'::regclass AND key.oid = objid
            AND key.confrelid = refobjid
    WHERE refclassid = 'pg_class'::regclass AND refobjid = to_regclass(%s) AND deptype = 'n'
        AND coalesce(rule.ev_class, key.conrelid) IS NOT NULL ORDER BY 1
"""

log = structlog.stdlib.get_logger("datapipe.sinks")


class Retention:
    """Removes what is too old, and says what will go next.

    Args:
        begin: of a transaction in UTC whose waits for locks, and whose statements, are bounded: by
            a second, and by less than an answer may take.
        lock: key of the lock that whoever removes something has.
    """

    def __init__(
        self, dialect: PostgresDialect, run: Run[Any], partitions: Partitions, begin: str, lock: int
    ) -> None:
        self._dialect = dialect
        self._run = run
        self._partitions = partitions
        self._begin = f"{begin}; SELECT pg_try_advisory_xact_lock({lock})"
        self._deleted: Counter[str] = Counter()  # since a table was last without such rows

    async def remove(self, table: Table) -> bool:
        """See `Upkeep.remove_expired`."""
        try:
            more: bool = await self._run(partial(self._step, table=table), table.name)
        except SinkUnavailable as exc:
            if exc.everywhere:
                raise
            if getattr(exc.__cause__, "pgcode", None) == _CANCELLED:
                text = f"what is too old can't be removed in time: {exc}"
                raise LaneBlocked(f"table {table.name}: {text}") from exc
            return False  # a lock; `check` says what is overdue
        return more

    async def _step(self, cursor: Any, table: Table) -> bool:
        await cursor.execute(self._begin)
        ((is_mine,),) = await cursor.fetchall()
        state = await look(cursor, table, self._dialect) if is_mine else None
        if state is None or not state.marked:
            await cursor.execute("COMMIT")
            return False
        if why := self._fault(table, state):
            raise LaneBlocked(f"table {table.name}: {why}")
        if state.partitioned:
            return await self._drop(cursor, table) or await self._detach(cursor, table, state)
        return await self._delete(cursor, table, state)

    async def _drop(self, cursor: Any, table: Table) -> bool:
        found = await fetch(cursor, _DETACHED, (self._comment(table),))
        if not found:
            return False
        schema, name = found[0]
        await cursor.execute(f"DROP TABLE {self._quoted(schema, name)}")
        await cursor.execute("COMMIT")
        log.info("partition removed", lane=table.name, partition=name)
        return True

    async def _detach(self, cursor: Any, table: Table, state: State) -> bool:
        oldest = state.partitions[0] if state.partitions else None
        if oldest and table.retention_s and oldest.end <= state.now - table.retention_s:
            name = self._quoted(oldest.schema, oldest.name)
            if not oldest.owned:
                why = f"may not remove it: ALTER TABLE {name} OWNER TO"
                role = self._dialect.quote(state.role)
                raise LaneBlocked(f"partition {oldest.name}: {state.role} {why} {role}")
            parent = self._dialect.table(table.name)
            # then only whoever reads the partition itself can make us wait, and loads behind us
            await cursor.execute(
                f"LOCK TABLE ONLY {parent} IN ACCESS EXCLUSIVE MODE; SET LOCAL lock_timeout = 100"
            )
            await cursor.execute(f"ALTER TABLE {parent} DETACH PARTITION {name}")
            await cursor.execute(self._dialect.comment(name, self._comment(table)))
        else:
            oldest = None
        await cursor.execute("COMMIT")
        return oldest is not None

    async def _delete(self, cursor: Any, table: Table, state: State) -> bool:
        deleted = 0
        if table.retention_s:
            name = self._dialect.parameterized(table.name)
            await cursor.execute(
                # ONLY: a child of it, by INHERITS, has rows of the same ctid
                f"DELETE FROM ONLY {name} WHERE ctid = ANY(ARRAY(SELECT ctid FROM ONLY {name}"
                " WHERE received_at < to_timestamp(%s) ORDER BY received_at LIMIT %s))",
                (state.now - table.retention_s, STEP_ROWS),
            )
            deleted = cursor.rowcount
        await cursor.execute("COMMIT")
        self._deleted[table.name] += deleted
        if deleted < STEP_ROWS and (rows := self._deleted.pop(table.name, 0)):
            log.info("rows removed", lane=table.name, rows=rows)
        return deleted == STEP_ROWS

    def _fault(self, table: Table, state: State) -> str | None:
        """Why what is too old can't be removed, or partitions can't be made, and what to do."""
        if state.partitioned:
            if not state.ranged:
                return (
                    "is partitioned by something else than RANGE (received_at) alone: datapipe "
                    "makes and removes none of its partitions; take partition and retention out"
                )
            return self._partitions.denied(table, state)
        if not table.retention_s:
            return None
        if not state.indexed:
            return (
                "nothing is removed without an index on received_at: "
                f"{self._dialect.index(table, concurrently=True)}"
            )
        if not state.may_delete:
            name, role = self._dialect.table(table.name), self._dialect.quote(state.role)
            return f"{state.role} may not delete rows: GRANT SELECT, DELETE ON {name} TO {role}"
        return None

    # --- what a person is told ---

    async def findings(self, table: Table) -> list[tuple[str, str]]:
        """For `check`: partitions that are there, and what goes next. Raises: SinkUnavailable."""
        is_kept = table.partition or table.retention_s
        state = await self._partitions.state(table) if is_kept else None
        if state is None:
            return []
        name = f"table {table.name}:"
        said: list[tuple[str, str]] = []
        if table.partition and not state.partitioned:
            text = (
                "was there before as a plain table: it gets no partitions, and loads all the same"
            )
            said.append(("warn", f"{name} {text}"))
        if not state.marked:
            text = "was not made by datapipe: it gets no partitions, and nothing of it is removed"
            said.append(("warn", f"{name} {text}; to change that: {_adopt(table)}"))
            return said
        if why := self._fault(table, state):
            return [*said, ("fail", f"{name} {why}")]
        if state.has_default:
            text = "rows in its DEFAULT partition never go, and keep others from being made"
            said.append(("warn", f"{name} {text}"))
        said += [("ok", f"{name} {text}") for text in await self._plans(table, state)]
        if why := await self._held(table, state):
            said.append(("warn", f"{name} {why}"))
        return said

    async def _held(self, table: Table, state: State) -> str | None:
        """What keeps a partition from being dropped that is detached, or would be next."""
        detached = await self._run(
            partial(fetch, sql=_DETACHED, values=(self._comment(table),)), table.name
        )
        overdue = table.retention_s and state.now - table.retention_s
        due = [(e.schema, e.name) for e in state.partitions[:1] if overdue and e.end <= overdue]
        for schema, name in [*detached, *due][:1]:
            of_it = partial(fetch, sql=_DEPENDENT, values=(self._quoted(schema, name),))
            if views := [view for (view,) in await self._run(of_it, table.name)]:
                depend = f"{', '.join(views)} depend{'' if views[1:] else 's'} on it"
                return f"partition {name} can't be dropped, nor any after it: {depend}"
        return None

    async def _plans(self, table: Table, state: State) -> list[str]:
        """What is there, and what will be removed next, and when."""
        plans = []
        if state.ranged:
            last = state.partitions[-1].end if state.partitions else state.now
            plans.append(f"{len(state.partitions)} partitions, the last until {moment(last)}")
        if not table.retention_s:
            return plans
        if state.ranged:
            what, at = "no partition", None
            if state.partitions:
                oldest = state.partitions[0]
                what, at = f"partition {oldest.name}", oldest.end
        else:
            what, at = "its oldest row", await self._oldest(table)
        if at is None:
            return [*plans, "there is nothing to be removed"]
        due = at + table.retention_s
        when = "as soon as nobody holds it" if due <= state.now else f"after {moment(due)}"
        return [*plans, f"next to be removed: {what}, {when}"]

    async def _oldest(self, table: Table) -> float | None:
        """When the oldest row was received."""
        name = self._dialect.parameterized(table.name)
        sql = f"SELECT extract(epoch FROM min(received_at))::float8 FROM ONLY {name} WHERE %s"
        ((at,),) = await self._run(partial(fetch, sql=sql, values=(True,)), table.name)
        return None if at is None else float(at)

    async def adopt(self, table: Table, say: Callable[[str], None]) -> None:
        """See `Upkeep.adopt`."""
        state = await self._partitions.state(table)
        if state is None:
            raise LaneBlocked(f"table {table.name}: there is none; datapipe will make it")
        if state.marked:
            say(f"table {table.name}: is kept by datapipe already")
            return
        if not state.owned:
            owner = self._dialect.quote(state.role)
            raise LaneBlocked(
                f"table {table.name}: only its owner may have it adopted, not {state.role}: "
                f"ALTER TABLE {self._dialect.table(table.name)} OWNER TO {owner}"
            )
        if why := self._fault(table, state):
            raise LaneBlocked(f"table {table.name}: {why}")
        for text in await self._meaning(table, state):
            say(f"table {table.name}: {text}")
        comment = "\n".join(filter(None, (state.comment, MARK)))
        sql = f"COMMENT ON TABLE {self._dialect.parameterized(table.name)} IS %s"
        await self._run(partial(fetch, sql=sql, values=(comment,)), table.name)
        say(f"table {table.name}: from now on its comment says: {MARK}")

    async def _meaning(self, table: Table, state: State) -> list[str]:
        said = []
        if state.ranged and table.partition:
            said.append(f"datapipe makes its partitions, for each {table.partition}")
        if table.retention_s:
            before = moment(state.now - table.retention_s)
            if state.ranged:
                gone = [e.name for e in state.partitions if e.end <= state.now - table.retention_s]
                said.append(
                    f"partitions that end before {before} are dropped: {gone or 'none yet'}"
                )
            else:
                said.append(f"rows that were received before {before} are deleted")
            said.append("and so it goes on, as time does")
        return said or ["nothing changes until its event type has a partition or a retention"]

    def _comment(self, table: Table) -> str:
        """Of a partition that was detached: by it, it is found."""
        return f"to be dropped by datapipe: was a partition of {self._dialect.table(table.name)}"

    def _quoted(self, schema: str, name: str) -> str:
        return f"{self._dialect.quote(schema)}.{self._dialect.quote(name)}"


def _adopt(table: Table) -> str:
    return f"datapipe schema --adopt {table.name}"
