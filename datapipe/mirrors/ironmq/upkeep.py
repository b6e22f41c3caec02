"""What keeps messages in IronMQ from being lost: leases, a new post before they expire, quarantine.

Leases only keep recoverers out of each other's way; one that expires costs work, not events. So
they are short, for a recoverer that is killed must not hold up what it had reserved. Each time one
is prolonged it is doubled, for prolonging costs requests, up to two minutes; then it expires, and
the message is free again. A stop releases what is reserved. Messages live 30 days at the
most; at 80 % of that one is posted anew, with the same segment id, and the old one deleted.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import structlog

from datapipe.mirrors import Membership
from datapipe.mirrors.ironmq.books import ANEW_S, LEASE_MAX_S, Books, Held
from datapipe.mirrors.ironmq.client import CallRefused, Client, Message, encode_post
from datapipe.mirrors.ironmq.wire import Unreadable, envelope_of, posted_anew
from datapipe.mirrors.recovery import known_to_ledger

ANEW_AGAIN_S = 21_600  # until one that was refused is tried again
_RELEASE_S = 1.0  # a stop does not wait longer

log = structlog.stdlib.get_logger("datapipe.mirrors.ironmq.mirror")


class Upkeep:
    """Looks after the messages in the books."""

    def __init__(self, client: Client, books: Books) -> None:
        self._client = client
        self._books = books

    async def keep(self, membership: Membership) -> None:
        """Prolong leases, post anew what is close to its expiration. Raises: MirrorUnavailable."""
        for queue in list(self._books.held):
            old: list[Held] = []
            for held in self._books.of_queue(queue):
                if self._half_over(held):
                    async with self._books.leases[queue]:
                        await self._prolong(queue, held)
                if self._books.clock() > held.anew_at:
                    old.append(held)
            loaded = await known_to_ledger(membership, [held.segment for held in old])
            for held in old:
                if held.segment in loaded:
                    held.never_anew()  # what is left to do here is to book a duplicate
                    continue
                async with self._books.leases[queue]:
                    await self._post_anew(queue, held)

    # --- leases ---

    def _half_over(self, held: Held) -> bool:
        """Whether a lease is to be prolonged."""
        if held.reservation is None or held.lease_s >= LEASE_MAX_S:
            return False
        left_s = held.lease_until - self._books.clock()
        return left_s < held.lease_s / 2 and self._books.holds(held)

    async def _prolong(self, queue: str, held: Held) -> None:
        if not self._half_over(held) or held.reservation is None:  # removed, released meanwhile
            return
        now, lease_s = self._books.clock(), min(2 * held.lease_s, LEASE_MAX_S)
        try:
            reservation = await self._client.touch(queue, held.id, held.reservation, lease_s)
        except CallRefused as exc:
            if exc.http_status not in (403, 404):
                raise
            held.reservation = None  # lost: the message is free again, and the ledger decides
        else:
            held.lease(reservation, lease_s, now)

    async def release(self, queue: str, held: Held) -> None:
        """End a lease of ours: the message is free, and still in our books."""
        if held.reservation is not None:
            await self._client.release(queue, held.id, held.reservation)
            held.reservation = None

    async def release_all(self) -> None:
        """As many as can be released in a second."""

        async def release_queue(queue: str) -> None:
            async with self._books.leases[queue]:
                # most of what is listed is not reserved, and may be a hundred thousand messages
                reserved = [held for held in self._books.of_queue(queue) if held.reservation]
                releases = [self.release(queue, held) for held in reserved]
                await asyncio.gather(*releases, return_exceptions=True)

        with suppress(TimeoutError):
            async with asyncio.timeout(_RELEASE_S):
                await asyncio.gather(*map(release_queue, list(self._books.held)))

    # --- age ---

    async def _post_anew(self, queue: str, held: Held) -> None:
        """One that is refused must not keep the others from it."""
        if not self._books.holds(held):
            return
        try:
            message = await self._client.get(queue, held.id)
            if message is None:
                held.never_anew()
                return
            posted = self._books.clock()
            new = await self.post_anew(queue, message.body, posted)
            old = held.entry(posted)
            held.id, held.anew_at, held.reservation = new, posted + ANEW_S, None
            await self._client.delete(queue, [old])
        except Unreadable as exc:
            held.never_anew()
            log.error("message unreadable", queue=queue, error=str(exc))
        except CallRefused as exc:
            if exc.http_status == 401:
                raise
            held.anew_at = self._books.clock() + ANEW_AGAIN_S
            log.error("message not posted anew", queue=queue, error=exc.detail)

    async def post_anew(self, queue: str, body: str, posted: float) -> str:
        """Post a message of ours once more, as of now; its new id. Raises: Unreadable."""
        envelope = envelope_of(body)
        self._books.appending.add(envelope.segment)
        try:
            return await self._client.post(queue, encode_post(posted_anew(envelope, posted)))
        finally:
            self._books.appending.discard(envelope.segment)

    async def quarantine(self, queue: str, message: Message, why: str) -> None:
        """Move a message that is damaged or foreign to a queue of its own; none is dropped."""
        quarantine = f"{queue}-unreadable"
        try:
            await self._client.make_queue(quarantine)
            await self._client.post(quarantine, encode_post(message.body))
        except CallRefused as exc:  # somebody with a larger plan sent it
            log.error("message unreadable", queue=queue, error=f"{why}; left: {exc.detail}")
            return
        await self._client.delete(queue, [(message.id, message.reservation_id)])
        log.error("message unreadable", queue=queue, moved_to=quarantine, error=why)
