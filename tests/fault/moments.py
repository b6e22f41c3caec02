"""The moments of a load, and how to act at one of them, whatever the database is."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable
from typing import Any

from tests.service import Service


class Moment(enum.Enum):
    """Where a load is; what is named has not happened yet, unless it says so."""

    LEDGER = "the entry into the ledger"
    COPY = "the first data of a COPY"
    COMMIT = "the request to commit"
    SENT = "the request to commit has passed"
    COMMITTED = "the answer to the commit"
    TOLD = "the answer to the commit has passed"


# True lets it happen, False breaks the connection instead
Hook = Callable[[Moment], Awaitable[bool]]


async def _pass(moment: Moment) -> bool:
    return True


class Moments:
    """`hook` is asked at each moment of each load of a service whose database is at `url`."""

    def __init__(self) -> None:
        self.hook: Hook = _pass
        self.url = ""

    def service(self, make_service: Callable[..., Service], **settings: Any) -> Service:
        """A service that comes through here."""
        return make_service(database_url=self.url, **settings)

    def let_pass(self) -> None:
        """Act at no moment any more."""
        self.hook = _pass

    async def at(
        self, moment: Moment, act: Callable[[], Awaitable[bool]], timeout_s: float = 20.0
    ) -> None:
        """Act at the next such moment, and at none after it; returns when it is done."""
        begun: asyncio.Future[asyncio.Task[bool]] = asyncio.get_running_loop().create_future()

        async def hook(seen: Moment) -> bool:
            if seen is not moment or self.hook is not hook:
                return True
            self.hook = _pass
            task = asyncio.create_task(_run(act))
            begun.set_result(task)
            return await asyncio.shield(task)  # its own connection may end because of it

        self.hook = hook
        done, _ = await asyncio.wait([begun], timeout=timeout_s)
        assert done, f"no load came to this in {timeout_s} s: {moment.value}"
        await (await begun)


async def _run(act: Callable[[], Awaitable[bool]]) -> bool:
    return await act()


async def cut() -> bool:
    """An act: break the connection instead of passing the message on."""
    return False
