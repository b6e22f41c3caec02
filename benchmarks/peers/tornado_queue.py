"""Tornado: each POST is put into a durable queue by a blocking call; a loader copies from there.

`python tornado_queue.py FOLDER`; the queue is a table in SQLite, the database $DATABASE_URL. Rows
leave the queue after their COPY has committed: a crash in between loads them twice.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import uvloop
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler

ANSWER = b'{"status_code": 0, "status_message": "ok"}'
INTERVAL_S = 10.0
COPY_ROWS = 10_000


class Queue:
    """Rows that wait; they are on the disk once `put` returns."""

    def __init__(self, file: Path) -> None:
        self._db = sqlite3.connect(file, isolation_level=None, cached_statements=16)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS queue (id INTEGER PRIMARY KEY AUTOINCREMENT,"
            " user_id INTEGER, timestamp INTEGER, message TEXT, received_at REAL)"
        )

    def put(self, events: list[dict[str, Any]]) -> None:
        now = time.time()
        rows = [(e["user_id"], e["timestamp"], e["message"], now) for e in events]
        insert = "INSERT INTO queue (user_id, timestamp, message, received_at) VALUES (?, ?, ?, ?)"
        if len(rows) == 1:
            self._db.execute(insert, rows[0])
            return
        self._db.execute("BEGIN")
        try:
            self._db.executemany(insert, rows)
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def last(self) -> int:
        ((number,),) = self._db.execute("SELECT coalesce(max(id), 0) FROM queue")
        return int(number)

    def first(self, count: int) -> list[tuple[int, int, int, str, float]]:
        return self._db.execute("SELECT * FROM queue ORDER BY id LIMIT ?", (count,)).fetchall()

    def forget(self, last: int) -> None:
        self._db.execute("DELETE FROM queue WHERE id <= ?", (last,))


class Loader:
    """Copies what waits to PostgreSQL, at an interval and on demand."""

    def __init__(self, queue: Queue, database: asyncpg.Pool) -> None:
        self._queue = queue
        self._database = database
        self._one = asyncio.Lock()

    async def load(self) -> int:
        """All that waits now; how many rows."""
        loaded = 0
        async with self._one, self._database.acquire() as connection:
            last = self._queue.last()
            while rows := self._queue.first(COPY_ROWS):
                await connection.copy_records_to_table(
                    "crash_report",
                    columns=("user_id", "timestamp", "message", "received_at"),
                    records=[(*row[1:4], datetime.fromtimestamp(row[4], UTC)) for row in rows],
                )
                self._queue.forget(rows[-1][0])
                loaded += len(rows)
                if rows[-1][0] >= last:
                    break
        return loaded

    async def run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self.load()
            except (OSError, asyncpg.PostgresError) as exc:
                print(f"load failed, again in {INTERVAL_S} s: {exc}", file=sys.stderr)


class Ingest(RequestHandler):
    def initialize(self, queue: Queue) -> None:
        self._queue = queue

    def post(self) -> None:
        try:
            body = json.loads(self.request.body)
        except ValueError as exc:
            raise HTTPError(400, str(exc)) from exc
        events = body if isinstance(body, list) else [body]
        if not events or not all(map(is_crash, events)):
            raise HTTPError(400, "not a crash_report")
        self._queue.put(events)
        self.set_header("Content-Type", "application/json")
        self.finish(ANSWER)


class Load(RequestHandler):
    def initialize(self, loader: Loader) -> None:
        self._loader = loader

    async def post(self) -> None:
        self.finish({"loaded": await self._loader.load()})


def is_crash(event: Any) -> bool:
    """Has it the keys and types of a crash report that PostgreSQL can store?"""
    return (
        isinstance(event, dict)
        and event.get("event_name") == "crash_report"
        and all(
            type(event.get(key)) is int and -(2**63) <= event[key] < 2**63
            for key in ("user_id", "timestamp")
        )
        and isinstance(event.get("message"), str)
        and "\0" not in event["message"]
    )


async def serve(folder: Path) -> None:
    queue = Queue(folder / "queue.sqlite")
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1, max_size=1) as database:
        loader = Loader(queue, database)
        app = Application(
            [("/", Ingest, {"queue": queue}), ("/load", Load, {"loader": loader})],
            log_function=lambda handler: None,
        )
        sockets = bind_sockets(0, "127.0.0.1", backlog=1024)
        HTTPServer(app, max_body_size=8 * 2**20).add_sockets(sockets)
        host, port = sockets[0].getsockname()
        print(json.dumps({"event": "listening", "address": f"http://{host}:{port}"}), flush=True)
        await loader.run()


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1])))
