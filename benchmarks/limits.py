"""What holds a figure back, by its goal: the page tells it while the goal is missed."""

from __future__ import annotations

from benchmarks.peers import PEERS
from benchmarks.stores import STORES

_CORES = (
    "Two cores serve the generator, PostgreSQL, the journals' writers and the kernel's flushes as "
    "well: see what an event costs in each under [Several processes](#several-processes)."
)
_KERNEL = (
    "Of the CPU that an event takes more than half is the kernel's, which reads and writes the "
    "socket for either (profile of the event loop by py-spy --native: read 31 %, write 26 %, "
    "epoll 4 %); the rest is Python: decoding and the row 13 %, the head, the group, the answer. "
    "A Fastify that gathers pays as much for the kernel, and its own part is compiled."
)
_BATCH = (
    "datapipe writes each row twice, into the journal before the answer and into PostgreSQL; the "
    "peer writes it once, and its client waits for that. On two cores this uses up what COPY gains "
    "over one INSERT of 1,000 rows. What the peer has not: while PostgreSQL is away it refuses "
    "everything, and an answer that is lost doubles what is sent again."
)

_FLUSHES = (
    "An append waits for two of three nodes, which run on the service's cores and flush to one "
    "disk; the cores are not used up (*machine's busy cores*)."
)
_THRICE = (
    "The nodes write each row three times, on the service's own cores and disk: 1.8 CPU seconds a "
    "million events (2.2 with sync always) beside the service's 1.1; pulling and acknowledging "
    "are little of it."
)
_NODES = (
    "The three nodes run on the service's two cores, and two processes use those up (*machine's "
    "busy cores*); what each stores at a time is half as large, so an event costs the nodes twice "
    "as much."
)

_WAITING = (
    "Waiting for a processor: the service, its threads, the database's server and the generator "
    "share two, with whatever else runs. What the service's own threads wait for each other is "
    "5.9 ms at most in 99 of 100 cases ([performance](performance.md))."
)

_GATHERED, _CLUSTERED, _INSERTS = (peer.name for peer in PEERS[:3])

LIMITS: dict[str, str] = {
    f"single, 64 connections, one process / {_GATHERED}": _KERNEL,
    f"single, 256 connections, one process / {_GATHERED}": _KERNEL,
    f"single, 64 connections, one process a core / {_CLUSTERED}": _CORES,
    f"single, 256 connections, one process a core / {_CLUSTERED}": _CORES,
    "IronMQ, 64 connections, share": (
        "A bare call to the stand-in takes 51.4 ms alone and up to 52.6 beside others, as its "
        "client shares the two cores with it, so 0.95 to 0.97 is the most. 1.6 ms (a 32nd of a "
        "call) an event waits for others to share its call, for each call costs money."
    ),
    "a file by `datapipe send` / wrk's batches": (
        "Of the 2.6 s that a million events take, 0.4 is the start of the command, before anything "
        "is sent, and 0.3 the last load; from its start to its last answer the command itself "
        "counts 0.7 of wrk's rate. It reads, unpacks, cuts and hashes on the two cores that the "
        "service and PostgreSQL need, and to load keyed pieces costs the service half as much "
        "again as wrk's without keys."
    ),
    "single, a fresh Idempotency-Key each / without": (
        "A key costs 10 us on the event loop and 3 beside it: it is cut out of the head (2.5), two "
        "hashes (2), a part of its own in what is stored, as JSON, and a journal row that is more "
        "than twice as long. An event without a key has become cheaper by more than one with."
    ),
    "keys, peak MB": (
        "The hashes of waiting keys are held in memory beside the rows, and `buffer_max_bytes` "
        "does not count them yet."
    ),
    "batches of 1,000, events/s": (
        "Both cores: the service uses 0.8 of one (a third of that is decoding JSON and writing "
        "rows), PostgreSQL 0.7, the generator and the kernel's flushes the rest. A run holds the "
        "start, in which PostgreSQL waits for the first 32 MiB."
    ),
    f"batches of 1,000 / {_GATHERED}": _BATCH,
    f"batches of 1,000 / {_CLUSTERED}": _BATCH,
    f"batches of 1,000 / {_INSERTS}": _BATCH,
    **{
        goal: limit
        for name in ("NATS (default sync)", "NATS (sync always)")
        for goal, limit in {
            f"single, 64 connections, {name} / journal": _FLUSHES,
            f"single, 256 connections, {name} / journal": _FLUSHES,
            f"batches of 1,000 until committed, {name} / journal": _THRICE,
            f"{name}, 2 processes / 1": _NODES,
        }.items()
    },
    **{
        f"p99 ms of the event loop's delay while loads run, {store.name}": _WAITING
        for store in STORES
    },
    "idle after the start, MB": (
        "All but 2 MB are imported code: the interpreter 11, asyncio with OpenSSL 10, aiohttp 15.5 "
        "(its client too, which reads the system's certificates at import), psycopg2 with the "
        "libraries that it brings along 6, uvloop, structlog and datapipe 2 each, SQLite and "
        "msgspec 1 each, httptools and what stands around it 1. 19 MB are pages of shared "
        "libraries. What only other settings need is not imported."
    ),
    "idle after a million events, MB": (
        "As after the start, and what the interpreter's own allocator keeps in pieces."
    ),
    "p99 ms inside the service at half of the top rate, while loads run": (
        "At a fixed rate few events share an append, so an event takes twice the CPU that it takes "
        "at the top rate, and most of a core is in use before a load begins: the event loop, the "
        "journal's thread, COPY's and PostgreSQL wait for two cores."
    ),
}
