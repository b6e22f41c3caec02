"""Pairing: one cluster and one database belong together, by the prefix, for ever.

Into another database what comes again would be loaded again; and of two clusters with one database
each would have the other's segments forgotten. So the cluster has a marker: a stream that holds
nothing, and bears a random id of the database's. The ledger has that id, too, and whether the
marker was seen to stand.

ledger         marker
none, pending  none      the id is entered into the ledger, pending; the marker is made with it
pending        the same  it is confirmed
confirmed      the same  paired
confirmed      none      refused: another cluster, or it was made anew
any            another   refused: the cluster is another database's

The id is in the ledger before the marker is made, and is confirmed last, so wherever a process dies
the next look goes on. To make a stream compares and sets: of several who make it with different ids
one is first, and the others hear so. What is taken for missing may be there by now, unless it was
looked for later than what needs it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

from datapipe.errors import ConfigError, LaneBlocked, MirrorUnavailable, SinkUnavailable
from datapipe.mirrors import Mark, Membership
from datapipe.mirrors.nats.client import ANSWER_S, ApiError, Client, Denied
from datapipe.mirrors.nats.streams import NO_STREAM, OTHER_CONFIG, Streams

_MARK = "datapipe_database"  # key of the marker's metadata
_AGAIN_S = 1.0  # a leader that was just elected may not know all streams yet

log = structlog.stdlib.get_logger("datapipe.mirrors.nats")


def marker_config(prefix: str, mark: str) -> dict[str, Any]:
    """The marker, as STREAM.CREATE wants it, but for its replicas. Nothing is published there."""
    return {
        "name": prefix,
        "subjects": [f"{prefix}.mark"],
        "storage": "file",
        "discard": "new",
        "max_bytes": 1024,
        "max_msgs": 1,
        "metadata": {_MARK: mark},
    }


def id_of(info: dict[str, Any]) -> str:
    """The id that a marker bears, by its STREAM.INFO; empty: it is no marker."""
    return str(info["config"].get("metadata", {}).get(_MARK, ""))


def mismatch(prefix: str, mark: Mark | None, marker: str | None) -> str | None:
    """Why cluster and database don't belong together, if they don't, and the remedy."""
    if marker is None:
        if mark is None or not mark.confirmed:
            return None
        return (
            "nats_url, database_url: this database belongs to another cluster, or the cluster was "
            "made anew: connect both to what belongs together, or set another nats_prefix, or, if "
            f"that is meant, run DELETE FROM datapipe_ledger WHERE segment = 'cluster:{prefix}'"
        )
    if mark is not None and marker == mark.id:
        return None
    return (
        "nats_url, database_url: this cluster belongs to another database: connect both to what "
        "belongs together, or set another nats_prefix, or, if the database was made anew, delete "
        f"the stream {prefix}"
    )


class Pairing:
    """Attributes: seen: that they belong together, or that nobody may mark the cluster."""

    def __init__(self, client: Client, streams: Streams, prefix: str) -> None:
        self.seen = False
        self._client = client
        self._streams = streams
        self._prefix = prefix
        self._warned = False

    async def look(self, membership: Membership) -> None:
        """Compare ledger and marker; make both, where they are missing.

        Raises: ConfigError: they don't belong together; MirrorUnavailable: that was not seen yet.
        """
        try:
            await self._compare(membership)
            self.seen = True
        except ConfigError:
            self.seen = False
            raise
        except (SinkUnavailable, LaneBlocked):
            pass
        except MirrorUnavailable:
            if not self.seen:
                raise

    async def _compare(self, membership: Membership) -> None:
        marker = await self._marker()
        mark = await membership.find_mark(self._prefix)
        if mark is None and marker is None:
            mark = await membership.mark(self._prefix)
        if mark is not None and marker is None:
            marker = await (self._again() if mark.confirmed else self._make(mark.id))
        if (why := mismatch(self._prefix, mark, marker)) is not None:
            raise ConfigError(why)
        if mark is not None and marker is not None and not mark.confirmed:
            await membership.confirm_mark(self._prefix, mark.id)
            log.info("cluster and database paired", stream=self._prefix)

    async def _marker(self) -> str | None:
        """The id that the marker bears, or None: there is none."""
        try:
            return id_of(await self._client.api(f"STREAM.INFO.{self._prefix}"))
        except ApiError as exc:
            if exc.code != NO_STREAM:
                raise
            return None

    async def _again(self) -> str | None:
        await asyncio.sleep(_AGAIN_S)
        return await self._marker()

    async def _make(self, mark: str) -> str | None:
        """The id that the marker bears by now; None: we may not make it, so anybody is let in."""
        try:
            await self._streams.create(marker_config(self._prefix, mark), ANSWER_S)
        except Denied as exc:
            if not self._warned:
                log.warning("cluster and database not paired", stream=self._prefix, error=str(exc))
            self._warned = True
            return None
        except ApiError as exc:
            if exc.code == OTHER_CONFIG and (marker := await self._marker()) is not None:
                return marker  # else somebody is just making it
            why = f"{exc.detail}: the stream {self._prefix} can't be made now"
            raise MirrorUnavailable(why) from exc
        return mark
