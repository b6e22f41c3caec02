"""Structured logs on stdout, ours and the libraries' alike: JSON objects, but on a terminal.

A log event is a fixed phrase, its facts are keys with units:
`log.info("segments loaded", lane=lane, rows=rows, seconds=seconds)`.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import threading
from contextlib import suppress
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import structlog
from structlog.types import EventDict, Processor, WrappedLogger

_LINES = 2000  # that wait to be written, at most
_FLUSH_S = 2.0  # how long they may hold up the end of the process


class _QueuedHandler(logging.Handler):
    """Writes lines in a thread of its own: who reads them may stop reading, and nobody waits.

    What comes while `_LINES` wait is dropped; how many is logged once lines flow again.
    """

    def __init__(self, descriptor: int) -> None:
        # a SimpleQueue, which can take a line in the midst of taking another: the collector may
        # run anywhere, and objects log when they go
        self._lines: SimpleQueue[bytes | threading.Event] = SimpleQueue()
        super().__init__()
        self._descriptor = descriptor
        self._dropped = 0
        threading.Thread(target=self._write_on, name="log-writer", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._line(record)
        except Exception:
            self.handleError(record)
            return
        if self._lines.qsize() < _LINES:
            self._lines.put(line)
        else:
            self._dropped += 1

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")

    def flush(self) -> None:
        """Wait until all is written, at the end of the process."""
        written = threading.Event()
        self._lines.put(written)
        written.wait(_FLUSH_S)

    def _write_on(self) -> None:
        """In the thread, for ever."""
        reported = 0
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            self._write(line)
            if (dropped := self._dropped) > reported and self._lines.qsize() < _LINES // 2:
                facts = {"name": __name__, "levelname": "WARNING", "msg": "log lines dropped"}
                record = logging.makeLogRecord({**facts, "count": dropped - reported})
                self._write(self._line(record))
                reported = dropped

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        with suppress(OSError):  # nobody is there to read it
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except BlockingIOError:
                    select.select([], [self._descriptor], [])


def _handler(*, queued: bool) -> logging.Handler:
    if queued:
        with suppress(OSError, ValueError):  # what took the place of stdout may be no file
            return _QueuedHandler(sys.stdout.fileno())
    return logging.StreamHandler(sys.stdout)


def configure(level: str, fmt: str, *, queued: bool = False) -> None:
    """Send every log line of this process to stdout as one line.

    Library records, warnings and uncaught exceptions (also of threads) take the same way.

    Args:
        fmt: json; console, for people to read; auto: console on a terminal, else json.
        queued: nothing waits until a line is written; for what must go on though nobody reads.
    """
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    last: list[Processor] = [
        structlog.processors.format_exc_info, structlog.processors.JSONRenderer(),
    ]  # fmt: skip
    terminal = sys.stdout.isatty()
    if fmt == "console" or (fmt == "auto" and terminal):
        # without the values of variables, which may be secrets; `rich`, where it is there, has them
        plain, colours = structlog.dev.plain_traceback, terminal and "NO_COLOR" not in os.environ
        last = [structlog.dev.ConsoleRenderer(colors=colours, exception_formatter=plain)]
    handler = _handler(queued=queued)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                _add_dyno,
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *last,
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda args: _log_uncaught(*args[:3])


def set_level(level: str) -> None:
    """From now on lines below this level are left out."""
    logging.getLogger().setLevel(level.upper())


def _add_dyno(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Name the dyno on Heroku, where lines of all dynos meet in one stream."""
    if dyno := os.environ.get("DYNO"):
        event["dyno"] = dyno
    return event


def _log_uncaught(kind: type[BaseException], exc: Any, traceback: TracebackType | None) -> None:
    log = structlog.stdlib.get_logger("datapipe")
    log.critical("uncaught exception", exc_info=(kind, exc, traceback))
