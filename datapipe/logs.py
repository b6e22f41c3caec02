"""Structured logs: one JSON object a line on stdout, ours and the libraries' alike.

A log event is a fixed phrase, its facts are keys with units:
`log.info("segments loaded", lane=lane, rows=rows, seconds=seconds)`.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import sys
import threading
from contextlib import suppress
from types import TracebackType

import structlog
from structlog.types import EventDict, Processor, WrappedLogger


def _add_dyno(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Name the dyno on Heroku, where lines of all dynos meet in one stream."""
    if dyno := os.environ.get("DYNO"):
        event["dyno"] = dyno
    return event


_LINES = 2000  # that wait to be written, at most
_FLUSH_S = 2.0  # how long they may hold up the end of the process


class _QueuedHandler(logging.Handler):
    """Writes lines in a thread of its own: who reads them may stop reading, and nobody waits.

    What comes while `_LINES` wait is dropped, and how many is told once lines flow again.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[bytes] = queue.Queue(_LINES)
        self._dropped = self._told = 0
        threading.Thread(target=self._write_on, name="log-writer", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self._line(record))
        except queue.Full:
            self._dropped += 1
        except Exception:
            self.handleError(record)

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")

    def flush(self) -> None:
        """Wait until all is written, at the end of the process."""
        done = self._lines.all_tasks_done
        with done:
            done.wait_for(lambda: not self._lines.unfinished_tasks, _FLUSH_S)

    def _write_on(self) -> None:
        """In the thread, for ever."""
        while True:
            self._write(self._lines.get())
            if (dropped := self._dropped) > self._told and self._lines.qsize() < _LINES // 2:
                text = "log lines dropped"
                record = logging.LogRecord(__name__, logging.WARNING, "", 0, text, None, None)
                record.count = dropped - self._told
                self._told = dropped
                self._write(self._line(record))
            self._lines.task_done()

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
    """Send every log line of this process to stdout as one line, of `fmt` json or console.

    Library records, warnings and uncaught exceptions (also of threads) take the same way.

    Args: queued: nothing waits until a line is written; for what must go on though nobody reads.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_dyno,
        structlog.processors.StackInfoRenderer(),
    ]
    last: list[Processor] = [
        structlog.processors.format_exc_info, structlog.processors.JSONRenderer(),
    ]  # fmt: skip
    if fmt == "console":
        last = [structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty())]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = _handler(queued=queued)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def _log_uncaught(
    kind: type[BaseException], exc: BaseException, traceback: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, exc, traceback)
        return
    log = structlog.stdlib.get_logger("datapipe")
    log.critical("uncaught exception", exc_info=(kind, exc, traceback))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    _log_uncaught(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)
