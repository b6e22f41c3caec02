"""FastAPI and asyncpg: one INSERT for each POST. The database is $DATABASE_URL."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Literal

import asyncpg
import uvicorn
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field

ANSWER = b'{"status_code": 0, "status_message": "ok"}'
CONNECTIONS = 20
INSERT = (
    'INSERT INTO crash_report (user_id, "timestamp", message, received_at)'
    " VALUES ($1, $2, $3, now())"
)
INSERT_MANY = (
    'INSERT INTO crash_report (user_id, "timestamp", message, received_at)'
    " SELECT *, now() FROM unnest($1::bigint[], $2::bigint[], $3::text[])"
)
Bigint = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]


class CrashReport(BaseModel):
    event_name: Literal["crash_report"]
    user_id: Bigint
    timestamp: Bigint
    message: str


Batch = Annotated[list[CrashReport], Field(min_length=1)]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, asyncpg.Pool]]:
    async with asyncpg.create_pool(
        os.environ["DATABASE_URL"], min_size=CONNECTIONS, max_size=CONNECTIONS, reset=keep
    ) as pool:
        yield {"pool": pool}


async def keep(connection: asyncpg.Connection) -> None:
    """Nothing is set on a connection here, so a round trip to reset it can be spared."""


app = FastAPI(lifespan=lifespan, strict_content_type=False)


@app.post("/")
async def take(request: Request, body: CrashReport | Batch) -> Response:
    pool = request.state.pool
    if isinstance(body, CrashReport):
        await pool.execute(INSERT, body.user_id, body.timestamp, body.message)
    else:
        await pool.execute(
            INSERT_MANY,
            [event.user_id for event in body],
            [event.timestamp for event in body],
            [event.message for event in body],
        )
    return Response(ANSWER, media_type="application/json")


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    host, port = listener.getsockname()
    print(json.dumps({"event": "listening", "address": f"http://{host}:{port}"}), flush=True)
    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", lifespan="on", access_log=False, log_level="warning"
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
