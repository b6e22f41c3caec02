"""gunicorn in front of datapipe: `gunicorn -c deploy/gunicorn.conf.py datapipe.app:gunicorn_app`.

What is set here is what gunicorn has to say. All else is in datapipe's own settings; of those,
`host`, `port` and `reuse_port` say nothing here: the port is gunicorn's. The workers share
`data_dir`, and appear as one.

Nothing of datapipe is imported here: workers that SIGHUP starts are to bring new code.
"""

import json
import logging
import os
from datetime import UTC, datetime

bind = f"127.0.0.1:{os.environ.get('PORT', '8080')}"
workers = int(os.environ.get("WEB_CONCURRENCY", "2"))
reuse_port = True  # a socket for each worker: of a shared one, the first takes all that waits
worker_class = "aiohttp.GunicornUVLoopWebWorker"
graceful_timeout = 30  # seconds; longer than shutdown_timeout, or the last loads are cut short
timeout = 60  # a worker says nothing while it loads what is left: longer than graceful_timeout
control_socket_disable = True


class JsonLines(logging.Formatter):
    """gunicorn's own lines in the form of the service's."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "timestamp": f"{datetime.fromtimestamp(record.created, UTC):%Y-%m-%dT%H:%M:%S.%fZ}",
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


logconfig_dict = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": JsonLines}},
    "handlers": {
        "stdout": {
            "class": "logging.StreamHandler",
            "stream": "ext://sys.stdout",
            "formatter": "json",
        },
    },
    "root": {"level": "INFO", "handlers": []},
    "loggers": {"gunicorn.error": {"level": "INFO", "handlers": ["stdout"], "propagate": False}},
}
