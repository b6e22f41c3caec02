"""An event module: SIGUSR1 makes the service log 5,000 lines, numbered on."""

import itertools
import signal
from types import FrameType

import structlog

_numbers = itertools.count()
log = structlog.stdlib.get_logger("chatty")


def _chat(number: int, frame: FrameType | None) -> None:
    for at in itertools.islice(_numbers, 5000):
        log.info("chat", number=at, text="x" * 200)


signal.signal(signal.SIGUSR1, _chat)
