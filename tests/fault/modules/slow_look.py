"""An event module that makes a look into the journal take two seconds, as a slow disk does."""

import asyncio

from datapipe.mirrors.journal import Journal

_recover = Journal.recover


async def _slowly(self, neighbours):
    await asyncio.sleep(2.0)
    return await _recover(self, neighbours)


Journal.recover = _slowly
