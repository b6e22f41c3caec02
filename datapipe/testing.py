"""For tests of one's own event types: a service in the test's process that needs no database.

    async with datapipe.testing.service(event_modules=["shop.events"]) as service:
        status, answer = await service.post({"event_name": "signup", "user_id": 7})
        rows = await service.rows("signup")

It answers over HTTP as `datapipe serve` does; its rows are kept in memory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypedDict

import aiohttp
import msgspec
from aiohttp import web

from datapipe.app import PIPELINE, Pipeline, create_app, create_runner
from datapipe.events.types import PG_TYPES
from datapipe.settings import Settings
from datapipe.sinks.letters import event_json
from datapipe.sinks.memory import MemoryDatabase

_PYTHON: dict[str, Any] = {name: kind for kind, name in PG_TYPES.items()}
_PYTHON |= {"jsonb": Any, "json": Any}


class Service:
    """One running service.

    Attributes: url: for clients of one's own. pipeline: what it is made of.
    """

    def __init__(
        self, url: str, pipeline: Pipeline, database: MemoryDatabase, session: aiohttp.ClientSession
    ) -> None:
        self.url = url
        self.pipeline = pipeline
        self._database = database
        self._session = session

    async def post(self, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        """`POST /`, with bytes or text as they are or something to be made JSON; its answer.

        Args: headers: with `_` for `-`, such as `Idempotency_Key="a"`.
        Returns: the HTTP status, and the JSON of the answer.
        """
        data = body if isinstance(body, bytes | str) else json.dumps(body)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._session.post(self.url, data=data, headers=named) as response:
            return response.status, await response.json()

    async def rows(self, event_name: str) -> list[dict[str, Any]]:
        """All rows of this type's table, in the order of their arrival, as Python values.

        A value of `dict` or `list` is its JSON, decoded. Raises: KeyError: no such event type.
        """
        columns = self.pipeline.registry.kinds[event_name].columns
        await self.pipeline.loader.load_now()
        values = {column.name: _PYTHON[column.type] | None for column in columns}
        row = TypedDict("row", values)  # type: ignore[misc]  # known at run time
        decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(row)
        lines = self._database.rows(event_name)
        return [decoder.decode(event_json(event_name, columns, line)) for line in lines]


@asynccontextmanager
async def service(**settings: Any) -> AsyncIterator[Service]:
    """A service of these settings on a free port of this machine; its rows go with it.

    All classes that are registered in this process are known to it; `event_modules` and `events`
    add more. Raises: ConfigError: a setting or an event type is wrong.
    """
    database = MemoryDatabase()
    with tempfile.TemporaryDirectory(prefix="datapipe-testing-") as folder:
        given = {"host": "127.0.0.1", "mirror": "none", "data_dir": folder, **settings}
        app = create_app(Settings(**given), open_sink=database.open)
        runner = create_runner(app)
        try:
            await runner.setup()
            await web.TCPSite(runner, given["host"], 0).start()
            host, port = runner.addresses[0][:2]
            async with aiohttp.ClientSession() as session:
                yield Service(f"http://{host}:{port}/", app[PIPELINE], database, session)
        finally:
            await runner.cleanup()
