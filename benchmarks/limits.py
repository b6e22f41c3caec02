"""What holds a figure back, by its goal: the page tells it while the goal is missed."""

from __future__ import annotations

_HTTP = (
    "Node's HTTP server takes a request for 17 us of CPU where bare aiohttp takes 25: an aiohttp "
    "application that stores nothing is behind it, too. A second process does not double the rate "
    "on two cores, which the generator, the journals' writers and the kernel's flushes share."
)
_BATCH = (
    "datapipe writes each row twice, into the journal before the answer and into PostgreSQL; the "
    "peer writes it once, and its client waits for that. On two cores this uses up what COPY gains "
    "over one INSERT of 1,000 rows. What the peer has not: while PostgreSQL is away it refuses "
    "everything, and an answer that is lost doubles what is sent again."
)

LIMITS: dict[str, str] = {
    "single, one process a core / Fastify + postgres, gathered": _HTTP,
    "single, one process a core / Fastify + postgres, gathered, 2 processes": _HTTP,
    "batches of 1,000, events/s": (
        "Both cores: the service uses 0.8 of one (a third of that is decoding JSON and writing "
        "rows), PostgreSQL 0.7, the generator and the kernel's flushes the rest. A run holds the "
        "start, in which PostgreSQL waits for the first 32 MiB."
    ),
    "batches of 1,000 / Fastify + postgres, gathered": _BATCH,
    "batches of 1,000 / Fastify + postgres, gathered, 2 processes": _BATCH,
    "batches of 1,000 / Fastify + postgres, an INSERT each": _BATCH,
    "idle after the start, MB": (
        "52 MB are imported code: the interpreter 11, asyncio 10, aiohttp 16. The environment of "
        "the tests adds 5: structlog imports rich where it is installed, and datapipe does not ask "
        "for it. Installed without the tests' packages an idle service took 56.5 MB (one run)."
    ),
    "idle after a million events, MB": (
        "As after the start (63.5 MB without the tests' packages, one run), and what the "
        "interpreter's own allocator keeps in pieces."
    ),
    "p99 ms of the answer at half of the top rate": (
        "At a fixed rate few events share an append, so an event takes 49 us of CPU, not 25, and "
        "0.9 core is in use before a load begins; while it runs answers queue up. Without a load "
        "in it p99 is 5 to 7 ms. Which weighs most, the interpreter lock or the flushes of the "
        "journal and PostgreSQL on one disk, is not found out; smaller loads and a shorter switch "
        "interval changed nothing."
    ),
}
