"""What `datapipe check` says of the cluster: only questions are asked there, nothing is changed.

A call for which there is no right gets no answer. Where the server has said so the right is named;
else a time-out may mean it. Whether streams may be made is asked by a call that JetStream refuses
before it does anything: its body names no stream (10056).
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import aiohttp
import msgspec

from datapipe.errors import LaneBlocked, MirrorUnavailable, SinkUnavailable
from datapipe.events.registry import load_registry
from datapipe.mirrors import FindMark
from datapipe.mirrors.nats.client import ApiError, Client, NoResponders
from datapipe.mirrors.nats.pairing import id_of, marker_config, mismatch
from datapipe.mirrors.nats.streams import (
    CONSUMER,
    NO_CONSUMER,
    NO_STREAM,
    consumer_config,
    stream_config,
)
from datapipe.mirrors.nats.wire import stream_of
from datapipe.settings import Settings

MONITORING_PORT = 8222  # the usual one; clients are not told which it is
_CONNECT_S = 5.0
_ANSWER_S = 2.0
_AT_ONCE = 32
_GROUP_COMMIT = (2, 15)  # of replicated streams, with `sync_interval: always`
_HEAD_BYTES = 4096  # of a message, beside an event's values

# What differs here loses events or never delivers them; all else costs speed or room.
_FATAL = {
    "subjects", "retention", "storage", "discard", "max_age", "no_ack", "sealed", "ack_policy",
    "deliver_policy", "max_deliver", "filter_subject", "filter_subjects",
}  # fmt: skip
_MADE_ANEW = {"retention", "storage"}  # can't be changed

Finding = tuple[str, str]


def _ok(text: str) -> Finding:
    return "ok", f"nats{text}"


def _warn(text: str) -> Finding:
    return "warn", f"nats{text}"


def _fail(text: str) -> Finding:
    return "fail", f"nats{text}"


async def check_nats(
    settings: Settings,
    monitoring_port: int = MONITORING_PORT,
    find_mark: FindMark | None = None,
) -> list[Finding]:
    """See `MirrorPlugin.check_paired`. Raises: ConfigError: a file of certificates is wrong."""
    client = Client(settings)
    async with client.connecting():
        try:
            await client.wait_connected(_CONNECT_S)
        except MirrorUnavailable as exc:
            if client.refused is None:
                return [("away", f"nats: no server of nats_url can be used: {_why(exc)}")]
            return [_fail(f": refuses us: {client.refused}: see nats_url, the login, the files")]
        varz = await _monitored(client.hosts, monitoring_port)
        nodes = max((_cluster_size(each) for each in varz.values()), default=None)
        look = _Look(client, settings, settings.nats_replicas or min(3, nodes or 3))
        return [
            *_reached(client, varz, nodes),
            *_synced(client.hosts, varz, nodes, monitoring_port),
            *await look.account(),
            *(await look.pairing(find_mark) if find_mark else ()),
            *await look.lanes(),
            *await look.unregistered(),
            *_payload(client, settings),
        ]


def _why(exc: MirrorUnavailable) -> str:
    return exc.detail.removeprefix("NATS: ")


# --- nodes ---


async def _monitored(hosts: Iterable[str], port: int) -> dict[str, dict[str, Any]]:
    """/varz of each node whose monitoring port can be reached, by the node's name.

    Source: docs.nats.io, "Monitoring NATS".
    """
    timeout = aiohttp.ClientTimeout(total=_ANSWER_S)

    async def ask(session: aiohttp.ClientSession, host: str) -> dict[str, Any]:
        address = f"[{host}]" if ":" in host else host
        async with session.get(f"http://{address}:{port}/varz") as response:
            return msgspec.json.decode(await response.read(), type=dict[str, Any])

    async with aiohttp.ClientSession(timeout=timeout) as session:
        asked = (ask(session, host) for host in hosts)
        answers = await asyncio.gather(*asked, return_exceptions=True)
    # whatever answers there may be something else
    found = [each for each in answers if isinstance(each, dict) and "jetstream" in each]
    return {each["server_name"]: each for each in found}


def _cluster_size(varz: dict[str, Any]) -> int:
    size: int = (varz["jetstream"].get("meta") or {}).get("cluster_size", 1)
    return size


def _reached(
    client: Client, varz: dict[str, dict[str, Any]], nodes: int | None
) -> Iterator[Finding]:
    many = f", nodes: {nodes}" if nodes else ""
    yield _ok(f": reached, version {client.version}{many}")
    versions = {f" node {name}": each["version"] for name, each in varz.items()}
    for name, version in sorted((versions or {"": client.version}).items()):
        if _numbers(version) < _GROUP_COMMIT:
            why = "before 2.15 a replicated stream flushes each message by itself"
            yield _warn(
                f"{name}: version {version}: {why}, which is slow if sync_interval is always"
            )


def _numbers(version: str) -> tuple[int, ...]:
    with suppress(ValueError):
        return tuple(int(each) for each in version.split(".")[:2])
    return _GROUP_COMMIT  # of a form that we don't know


def _synced(
    hosts: set[str], varz: dict[str, dict[str, Any]], nodes: int | None, port: int
) -> Iterator[Finding]:
    """Whether what is acknowledged is on disk, and what is reserved there."""
    for name, each in sorted(varz.items()):
        config = each["jetstream"].get("config") or {}
        reserved = (each["jetstream"].get("stats") or {}).get("reserved_storage", 0)
        room = f"{reserved} of {config.get('max_storage', 0)} bytes reserved"
        if config.get("sync_always"):
            yield _ok(f" node {name}: sync_interval is always, {room}")
        elif config:
            seconds = config.get("sync_interval", 0) / 1e9
            why = "a power cut of all nodes loses what was answered 200 since then"
            remedy = "set jetstream { sync_interval: always }"
            yield _warn(f" node {name}: sync_interval is {seconds:g} s: {why}: {remedy}; {room}")
    if len(varz) < (nodes or 1):
        seen = f"{len(varz)} of {nodes or 'the'} nodes" if varz else "none of the nodes"
        more, where = "more " if varz else "", ", ".join(sorted(hosts))
        silent = f"nothing {more}answers on port {port} of {where}"
        remedy = f"on each, `curl http://127.0.0.1:{port}/varz` has to show sync_always as true"
        yield _warn(f": sync_interval is known of {seen}: {silent}; {remedy}")


# --- JetStream ---


class _Look:
    """Questions to JetStream. Args: replicas: that a stream should have."""

    def __init__(self, client: Client, settings: Settings, replicas: int) -> None:
        self._client = client
        self._settings = settings
        self._replicas = replicas
        self._prefix = settings.nats_prefix
        registry = load_registry(settings)
        self._lanes = sorted(registry.lanes)
        self._kinds = registry.kinds
        self._several = asyncio.Semaphore(_AT_ONCE)

    async def _ask(self, call: str, **body: Any) -> dict[str, Any]:
        async with self._several:
            return await self._client.api(call, timeout_s=_ANSWER_S, **body)

    def _denied(self, call: str) -> bool:
        return f"$JS.API.{call}".lower() in self._client.denied

    def _unanswered(self, call: str, exc: MirrorUnavailable) -> str:
        if self._denied(call):
            return f"the right to publish to $JS.API.{call} is missing"
        if isinstance(exc, ApiError | NoResponders):
            return _why(exc)
        why = "the cluster has no leader, or the right to publish to that is missing"
        return f"$JS.API.{call} does not answer: {why}"

    def _level(self, call: str, exc: MirrorUnavailable) -> str:
        return "fail" if self._denied(call) or isinstance(exc, ApiError) else "away"

    async def account(self) -> list[Finding]:
        """What is stored and reserved, and how much may be."""
        try:
            info = await self._ask("INFO")
        except (ApiError, NoResponders) as exc:
            return [_fail(f": this account has no JetStream: {_why(exc)}")]
        except MirrorUnavailable as exc:
            return [_warn(f": what is reserved is not seen: {self._unanswered('INFO', exc)}")]
        found = []
        for tier, each in sorted((info.get("tiers") or {"": info}).items()):
            most = each["limits"]["max_storage"]
            limit = f"of {most} bytes" if most >= 0 else "bytes, without a limit"
            found.append(
                _ok(
                    f" account{tier and f' {tier}'}: {each['streams']} streams, {each['storage']} "
                    f"bytes stored, reserved {each.get('reserved_storage', 0)} {limit}"
                )
            )
        return found

    async def lanes(self) -> list[Finding]:
        """Each lane's stream and consumer."""
        each = await asyncio.gather(*map(self._lane, self._lanes))
        return [finding for findings in each for finding in findings]

    async def pairing(self, find_mark: FindMark) -> list[Finding]:
        """Whether the cluster and the database belong together."""
        try:
            mark = await find_mark(self._prefix)
        except (SinkUnavailable, LaneBlocked) as exc:
            return [("away", f"nats: whether this is the database's cluster is not seen: {exc}")]
        marker = None
        try:
            marker = id_of(await self._ask(call := f"STREAM.INFO.{self._prefix}"))
        except MirrorUnavailable as exc:
            if not (isinstance(exc, ApiError) and exc.code == NO_STREAM):
                unseen = self._unanswered(call, exc)
                return [(self._level(call, exc), f"nats stream {self._prefix}: {unseen}")]
        if (why := mismatch(self._prefix, mark, marker)) is not None:
            return [_fail(f": {why}")]
        if marker is not None:
            return [_ok(f" stream {self._prefix}: pairs the cluster with the database")]
        if await self._may(create := f"STREAM.CREATE.{self._prefix}"):
            return [_ok(f" stream {self._prefix}: not there yet; the service pairs the cluster "
                        "with the database by it")]  # fmt: skip
        why = "processes with another database, which would load events twice, are not kept out"
        missing = f" stream {self._prefix}: not there, and {self._right(create)}: {why}"
        if mark is None:
            return [_warn(f"{missing}; once the service has run, `check` says how to make it")]
        config = marker_config(self._prefix, mark.id) | {"num_replicas": self._replicas}
        by_hand = _by_hand(self._prefix, config, "nats stream add", "warn")
        return [_warn(f"{missing}; to make it by hand:"), *by_hand]

    async def _lane(self, lane: str) -> list[Finding]:
        name = stream_of(self._prefix, lane)
        wanted = stream_config(self._settings, lane) | {"num_replicas": self._replicas}
        call = f"STREAM.INFO.{name}"
        try:
            info = await self._ask(call)
        except MirrorUnavailable as exc:
            if isinstance(exc, ApiError) and exc.code == NO_STREAM:
                return await self._missing(name, wanted)
            return [(self._level(call, exc), f"nats stream {name}: {self._unanswered(call, exc)}")]
        config, state = info["config"], info["state"]
        return [
            _ok(
                f" stream {name}: {state['messages']} messages, {state['bytes']} of "
                f"{config['max_bytes']} bytes, replicas: {config['num_replicas']}"
            ),
            *_differences(f"stream {name}", config, {**wanted, "no_ack": None, "sealed": None}),
            *await self._consumer(name),
        ]

    async def _missing(self, name: str, wanted: dict[str, Any]) -> list[Finding]:
        call = f"STREAM.CREATE.{name}"
        if await self._may(call):
            return [_ok(f" stream {name}: not there yet; the first event makes it")]
        return [
            _fail(f" stream {name}: not there, and {self._right(call)}; to make it by hand:"),
            *_by_hand(name, wanted, "nats stream add"),
            *_consumer_by_hand(name),
        ]

    async def _consumer(self, name: str) -> list[Finding]:
        call = f"CONSUMER.INFO.{name}.{CONSUMER}"
        try:
            info = await self._ask(call)
        except MirrorUnavailable as exc:
            if isinstance(exc, ApiError) and exc.code == NO_CONSUMER:
                return await self._missing_consumer(name)
            return [(self._level(call, exc), f"nats stream {name}: {self._unanswered(call, exc)}")]
        wanted = {**consumer_config(), "filter_subject": None, "filter_subjects": None}
        return list(_differences(f"consumer {name} {CONSUMER}", info["config"], wanted))

    async def _missing_consumer(self, name: str) -> list[Finding]:
        call = f"CONSUMER.CREATE.{name}.{CONSUMER}"
        if await self._may(call):
            return [_ok(f" consumer {name} {CONSUMER}: not there yet; the next event makes it")]
        return [
            _fail(f" consumer {name} {CONSUMER}: not there, and {self._right(call)}; by hand:"),
            *_consumer_by_hand(name),
        ]

    async def _may(self, call: str) -> bool:
        """Whether we have the right to this call; without its effect, as it names no stream."""
        try:
            await self._ask(call)
        except MirrorUnavailable as exc:
            return isinstance(exc, ApiError)  # it has heard us
        return True

    def _right(self, call: str) -> str:
        sure = "is" if self._denied(call) else "seems to be"
        return f"the right to publish to $JS.API.{call} {sure} missing"

    async def unregistered(self) -> list[Finding]:
        """Streams of the prefix whose event types nobody here knows."""
        names: list[str] = []
        try:
            while True:
                page = await self._ask(
                    "STREAM.NAMES", subject=f"{self._prefix}.>", offset=len(names)
                )
                names += page.get("streams") or []
                if not page.get("streams") or len(names) >= page["total"]:
                    break
        except MirrorUnavailable as exc:
            why = self._unanswered("STREAM.NAMES", exc)
            return [_warn(f": streams of unregistered event types are not seen: {why}")]
        known = {self._prefix, *(stream_of(self._prefix, lane) for lane in self._kinds)}
        return [
            _warn(f" stream {name}: is of no event type that is registered here: nothing loads it")
            for name in sorted(set(names) - known)
        ]


def _differences(what: str, config: dict[str, Any], wanted: dict[str, Any]) -> Iterator[Finding]:
    """Where something is not as we would have made it; None is the same as false or missing."""
    command = f"nats {what.replace(' ', ' edit ', 1)}"
    for key, value in wanted.items():
        there = config.get(key)
        if there == value or (value is None and not there):
            continue
        why = f"{key} is {_shown(there)}, not {_shown(value)}"
        if key == "max_bytes":
            why += ", nats_lane_max_bytes, which counts for new streams alone"
        remedy = "remove it while it is empty" if key in _MADE_ANEW else command
        yield ("fail" if key in _FATAL else "warn", f"nats {what}: {why}: {remedy}")


def _shown(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _consumer_by_hand(name: str) -> Iterator[Finding]:
    return _by_hand(f"{name}_{CONSUMER}", consumer_config(), f"nats consumer add {name}")


def _by_hand(
    name: str, config: dict[str, Any], command: str, level: str = "fail"
) -> Iterator[Finding]:
    """To be pasted: the configuration into a file, and the command that reads it."""
    yield level, f"  echo {shlex.quote(_shown(config))} > {name}.json"
    yield level, f"  {command} --config {name}.json"


def _payload(client: Client, settings: Settings) -> Iterator[Finding]:
    most, wanted = client.max_payload, settings.input_max_len
    if wanted + _HEAD_BYTES > most:
        why = f"longer events are refused, though input_max_len is {wanted}"
        yield _warn(f": max_payload of the servers is {most} bytes: {why}")
