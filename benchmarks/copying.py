"""COPY of rows in bursts, as the loads of a datapipe were, beside a server that stores nothing.

`python -m benchmarks.copying URL`, in a process of its own: the first line that it reads is
`[[seconds, rows], ...]`, when each burst is due and how large it is. It answers with a line once
the rows lie ready; the next line starts the clock. One transaction a burst; it ends after the last.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import psycopg2

from benchmarks.events import COLUMNS, NAMES, TABLE, as_rows, batches
from benchmarks.loads import database, rows
from benchmarks.servers import ROOT
from tests.postgres import Postgres

COPY_BYTES = 524_288  # of one COPY write, as datapipe's
_EVENTS = 1000

Burst = tuple[float, int]  # when it is due, in seconds, and how many rows it has


def main() -> None:
    bursts: list[Burst] = json.loads(sys.stdin.readline())
    blocks = [as_rows(batch) for batch in batches(_EVENTS)]
    files = [
        io.BytesIO(b"".join(blocks[i % len(blocks)] for i in range(-(-count // _EVENTS))))
        for _, count in bursts
    ]
    with closing(psycopg2.connect(sys.argv[1])) as connection, connection.cursor() as cursor:
        cursor.execute(f"CREATE TABLE {TABLE} ({COLUMNS})")
        connection.commit()
        print("ready", flush=True)
        sys.stdin.readline()
        began = time.monotonic()
        for (due, _), file in zip(bursts, files, strict=True):
            time.sleep(max(0, began + due - time.monotonic()))
            cursor.copy_expert(f"COPY {TABLE} ({NAMES}) FROM STDIN", file, COPY_BYTES)
            connection.commit()


@contextmanager
def beside(postgres: Postgres, bursts: Sequence[Burst]) -> Iterator[None]:
    """Copy these while the block runs; the clock starts with it.

    Raises: RuntimeError: not all was copied.
    """
    with database(postgres) as url:
        with subprocess.Popen(
            [sys.executable, "-m", "benchmarks.copying", url],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(bursts) + "\n")
            process.stdin.flush()
            process.stdout.readline()
            process.stdin.write("\n")
            process.stdin.flush()
            yield
        wanted = sum(count for _, count in bursts)
        if (copied := rows(postgres, url)) < wanted:
            raise RuntimeError(f"{copied} rows were copied beside the server, not {wanted}")


if __name__ == "__main__":
    main()
