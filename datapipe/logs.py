"""Structured logs: one JSON object a line on stdout, ours and the libraries' alike.

A log event is a fixed phrase, its facts are keys with units:
`log.info("segments loaded", lane=lane, rows=rows, seconds=seconds)`.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from types import TracebackType

import structlog
from structlog.types import EventDict, Processor, WrappedLogger


def _add_dyno(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Name the dyno on Heroku, where lines of all dynos meet in one stream."""
    if dyno := os.environ.get("DYNO"):
        event["dyno"] = dyno
    return event


def configure(level: str, fmt: str) -> None:
    """Send every log line of this process to stdout as one line, of `fmt` json or console.

    Library records, warnings and uncaught exceptions (also of threads) take the same way.
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
    handler = logging.StreamHandler(sys.stdout)
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
