"""Channel: questions to all processes that share the cluster, by a core request.

A process that is asked says so at once and then each second until its answer is ready, so that one
that is silent is told from one that is busy. Answers are packed: a thousand lanes fill megabytes.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable, Set
from contextlib import suppress

import structlog
from nats.aio.msg import Msg

from datapipe.errors import MirrorUnavailable
from datapipe.mirrors import Answers
from datapipe.mirrors.nats.client import Client

SILENT_S = 2.0
_BUSY_S = 0.5  # between two signs of life of one that works on its answer
_HEAD_BYTES = 1024  # of a message, beside its payload

log = structlog.stdlib.get_logger("datapipe.mirrors.nats")


class NatsChannel:
    """See `Channel`. Messages begin with the id of the process that sends them."""

    def __init__(self, client: Client, prefix: str, process: str) -> None:
        self._client = client
        self._subject = f"{prefix}.peers"
        self._process = process
        self._answering: set[asyncio.Task[None]] = set()

    async def answer(self, how: Callable[[bytes], Awaitable[bytes]]) -> None:
        """See `Channel.answer`."""

        async def on_question(message: Msg) -> None:
            asker, _, question = message.data.partition(b"\n")
            if asker != self._process.encode() and message.reply:
                task = asyncio.create_task(self._answer(message.reply, how, question))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)

        await self._client.subscribe(self._subject, on_question)

    async def _answer(
        self, reply: str, how: Callable[[bytes], Awaitable[bytes]], question: bytes
    ) -> None:
        answer = asyncio.ensure_future(how(question))
        try:
            while not answer.done():
                await self._send(reply, b"")
                await asyncio.wait([answer], timeout=_BUSY_S)
            packed = await asyncio.to_thread(zlib.compress, answer.result(), 1)
            if len(packed) + _HEAD_BYTES > self._client.max_payload:
                log.error("answer to a peer is too large", bytes=len(packed))
                packed = zlib.compress(b"")
            await self._send(reply, packed)
        except MirrorUnavailable:
            answer.cancel()
        except Exception:  # whoever asked finds that we are silent
            log.exception("fault")

    async def _send(self, reply: str, body: bytes) -> None:
        await self._client.publish("answer", reply, b"%b\n%b" % (self._process.encode(), body))

    async def ask(self, question: bytes, living: Set[str]) -> Answers:
        """See `Channel.ask`."""
        heard: dict[str, float] = {}
        found: dict[str, bytes] = {}
        news = asyncio.Event()

        async def on_answer(message: Msg) -> None:
            sender, _, body = message.data.partition(b"\n")
            heard[sender.decode()] = time.monotonic()
            if body:
                found[sender.decode()] = zlib.decompress(body)
            news.set()

        inbox = self._client.new_inbox()
        asked = time.monotonic()
        async with self._client.subscribed(inbox, on_answer):
            question = b"%b\n%b" % (self._process.encode(), question)
            await self._client.publish("ask", self._subject, question, inbox)
            while True:
                news.clear()
                now = time.monotonic()
                unanswered = (living | heard.keys()) - found.keys()
                busy = [each for each in unanswered if now - heard.get(each, asked) < SILENT_S]
                if not busy:
                    break
                first = min(heard.get(each, asked) for each in busy)
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(0.01, first + SILENT_S - now)):
                        await news.wait()
        answers = {each: body for each, body in found.items() if body}
        return Answers(answers, (living | heard.keys()) - answers.keys())
