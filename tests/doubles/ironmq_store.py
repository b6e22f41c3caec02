"""What IronMQ v3 does with queues and messages; no HTTP, no waiting.

Numbers such as 5.7 are sections of ironmq-v3.md, the notes on the IronMQ v3 HTTP contract. Where
IronMQ's own behaviour is unknown the choice is a field of `Rules`.

    delayed -> ready -> reserved -> deleted
       ^         ^---------|          a lease that times out, a release
       `-------------------'          a release with a delay
"""

import heapq
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Json = dict[str, Any]

MAX_N = 100  # messages in a reserve or a peek, ids in a delete (4)
MAX_WAIT_S = 30
MAX_TIMEOUT_S = 86_400
MAX_DELAY_S = 604_800
MAX_EXPIRATION_S = 2_592_000
FIRST_ID = 7_290_010_000_000_000_000  # ids are 19 digits and rise (8.4)


class Refused(Exception):
    """The answer is an error: `status` and a `msg`."""

    def __init__(self, status: int, msg: str) -> None:
        super().__init__(msg)
        self.status = status
        self.msg = msg


@dataclass(slots=True)
class Rules:
    """Choices where IronMQ is undocumented; a test may flip them, even midway.

    Defaults are those of section 8: where it matters, the one that punishes a careless client.
    """

    returned_to_front: bool = True  # off: behind all that was ready before
    strict_timeout: bool = False  # on: leases of 1..29 s are refused
    empty_ids: Literal["clear", "reject", "noop"] = "clear"
    bulk_partial: bool = False  # on: a failing bulk delete deletes its good entries all the same
    max_post: int = 100
    max_bytes: int = 65_536  # of the unpacked body
    count_head: bool = False  # on: the request line and headers count too
    oversize_status: int = 400


@dataclass(slots=True)
class Message:
    seq: int
    id: str
    body: str
    visible_at: float
    expires_at: float
    reserved_count: int = 0
    reservation_id: str = ""  # empty: not reserved
    until: float = 0.0  # end of the lease
    returned: bool = False

    def give_back(self, visible_at: float) -> None:
        self.reservation_id = ""
        self.returned = True
        self.visible_at = visible_at

    def view(self) -> Json:
        return {"id": self.id, "body": self.body, "reserved_count": self.reserved_count}


class Agenda:
    """Message ids in the order of a key; an id has one key, the last it was put under.

    Entries that were dropped or replaced stay in the heap until they surface or outnumber the rest,
    so every operation is cheap however many messages there are.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, ...], str]] = []
        self._keys: dict[str, tuple[float, ...]] = {}

    def put(self, id: str, *key: float) -> None:
        self._keys[id] = key
        heapq.heappush(self._heap, (key, id))
        if len(self._heap) > 2 * len(self._keys) + 64:
            self._heap = [(key, id) for id, key in self._keys.items()]
            heapq.heapify(self._heap)

    def drop(self, id: str) -> None:
        self._keys.pop(id, None)

    def first(self) -> str | None:
        while self._heap:
            key, id = self._heap[0]
            if self._keys.get(id) == key:
                return id
            heapq.heappop(self._heap)
        return None

    def due(self, now: float) -> str | None:
        id = self.first()
        return id if id is not None and self._keys[id][0] <= now else None

    def smallest(self, n: int) -> list[str]:
        taken: list[tuple[str, tuple[float, ...]]] = []
        while len(taken) < n and (id := self.first()) is not None:
            taken.append((id, self._keys.pop(id)))
        for id, key in taken:
            self.put(id, *key)
        return [id for id, _ in taken]


class Queue:
    """One queue. `messages` is by id, in the order they came."""

    def __init__(self, name: str, rules: Rules) -> None:
        self.name = name
        self.rules = rules
        self.settings: Json = {"message_timeout": 60, "message_expiration": 604_800, "type": "pull"}
        self.total_messages = 0
        self.clear()

    def clear(self) -> None:
        self.messages: dict[str, Message] = {}
        self.ready, self._later, self._expiry = Agenda(), Agenda(), Agenda()

    @property
    def size(self) -> int:
        """Ready, delayed and reserved messages (8.10)."""
        return len(self.messages)

    @property
    def bodies(self) -> list[str]:
        return [message.body for message in self.messages.values()]

    def add(self, message: Message, now: float) -> None:
        message.expires_at = now + self.settings["message_expiration"]
        self.messages[message.id] = message
        self._expiry.put(message.id, message.expires_at)
        self.total_messages += 1
        self.place(message, now)

    def place(self, message: Message, now: float) -> None:
        """File a message under what happens to it next: an end of lease, of delay, or a reserve."""
        self.ready.drop(message.id)
        self._later.drop(message.id)
        if message.reservation_id:
            self._later.put(message.id, message.until)
        elif message.visible_at > now:
            self._later.put(message.id, message.visible_at)
        elif message.returned and self.rules.returned_to_front:
            self.ready.put(message.id, 0, 0, message.seq)
        else:  # fresh ones became visible when posted, so this is the order of posting (8.3)
            self.ready.put(message.id, 1, message.visible_at, message.seq)

    def remove(self, id: str) -> Message:
        for agenda in (self.ready, self._later, self._expiry):
            agenda.drop(id)
        return self.messages.pop(id)

    def sweep(self, now: float) -> None:
        """Do what time has brought since the last call (8.2)."""
        while (id := self._expiry.due(now)) is not None:
            self.remove(id)
        while (id := self._later.due(now)) is not None:
            message = self.messages[id]
            if message.reservation_id:
                message.give_back(message.until)
            self.place(message, now)

    def leased(self, id: str, reservation_id: object) -> Message:
        """The message, if it is reserved under this very id (8.9)."""
        message = self.find(id)
        if not message.reservation_id or message.reservation_id != reservation_id:
            raise Refused(403, "Reservation not found or timed out")
        return message

    def deletable(self, id: str, reservation_id: object) -> Message:
        """The message, if this reservation id, or none, may delete it (8.7)."""
        message = self.find(id)
        if (reservation_id or "") != message.reservation_id:
            raise Refused(403, "Reservation id is wrong, missing or timed out")
        return message

    def find(self, id: str) -> Message:
        if id not in self.messages:
            raise Refused(404, "Message not found")
        return self.messages[id]


class Store:
    """The queues of one project. Methods are the calls of section 5; errors are raised."""

    def __init__(
        self, project_id: str, rules: Rules, clock: Callable[[], float], seed: int = 0
    ) -> None:
        self.queues: dict[str, Queue] = {}
        self._project_id = project_id
        self._rules = rules
        self._clock = clock
        self._random = random.Random(seed)
        self._seq = 0

    def queue(self, name: str) -> Queue:
        """Raises: Refused: 404, there is no such queue."""
        if name not in self.queues:
            raise Refused(404, "Queue not found")
        queue = self.queues[name]
        queue.sweep(self._clock())
        return queue

    def expire_leases(self) -> None:
        """End every reservation now, as if its timeout had passed."""
        now = self._clock()
        for queue in self.queues.values():
            for message in queue.messages.values():
                if message.reservation_id:
                    message.give_back(now)
                    queue.place(message, now)

    def _created(self, name: str) -> Queue:
        if name not in self.queues:
            self.queues[name] = Queue(name, self._rules)
        return self.queue(name)

    def _timeout(self, body: Json, queue: Queue) -> int:
        """A lease in seconds; 0 and absent mean the queue's own, as Go and .NET send 0 (4)."""
        timeout = _integer(body, "timeout", 0, 0, MAX_TIMEOUT_S)
        if self._rules.strict_timeout and 0 < timeout < 30:
            raise Refused(400, "timeout must be 30..86400")
        return timeout or int(queue.settings["message_timeout"])

    def _lease(self, message: Message, queue: Queue, timeout: int) -> None:
        """Reserving and touching both count, and both make a new id (3)."""
        now = self._clock()
        message.reserved_count += 1
        message.reservation_id = f"{self._random.getrandbits(128):032x}"
        message.until = now + timeout
        queue.place(message, now)

    # -- queues: 5.1 to 5.5, 8.12

    def put_queue(self, name: str, body: Json) -> Json:
        return self._configure(name, body, create=True)

    def patch_queue(self, name: str, body: Json) -> Json:
        return self._configure(name, body, create=False)

    def _configure(self, name: str, body: Json, create: bool) -> Json:
        wanted = body.get("queue") or {}
        if not isinstance(wanted, dict):
            raise Refused(400, "queue must be an object")
        known = None if create and name not in self.queues else self.queue(name)
        if (wanted.get("type") or "pull") != "pull":
            if known:
                raise Refused(403, "Queue type cannot be changed")
            raise Refused(400, "This stand-in has pull queues only")
        changes: Json = {}
        least = 30 if self._rules.strict_timeout else 1
        if wanted.get("message_timeout") is not None:
            changes["message_timeout"] = _integer(
                wanted, "message_timeout", 60, least, MAX_TIMEOUT_S
            )
        if wanted.get("message_expiration") is not None:
            changes["message_expiration"] = _integer(
                wanted, "message_expiration", 0, 1, MAX_EXPIRATION_S
            )
        if wanted.get("dead_letter") is not None:
            changes["dead_letter"] = _dead_letter(wanted["dead_letter"], name)
        queue = self._created(name)
        settings = queue.settings | changes
        queue.settings = {key: value for key, value in settings.items() if value is not None}
        return {"queue": self._view(queue)}

    def _view(self, queue: Queue) -> Json:
        return {"project_id": self._project_id, "name": queue.name, **queue.settings}

    def info(self, name: str) -> Json:
        queue = self.queue(name)
        counters = {"size": queue.size, "total_messages": queue.total_messages}
        return {"queue": self._view(queue) | counters}

    def delete_queue(self, name: str) -> Json:
        self.queue(name)
        del self.queues[name]
        return {"msg": "Deleted."}

    def list_queues(self, query: Json) -> Json:
        per_page = _integer(_number(query, "per_page"), "per_page", 30, 1, 100)
        prefix, previous = query.get("prefix", ""), query.get("previous", "")
        names = sorted(n for n in self.queues if n.startswith(prefix) and n > previous)
        return {"queues": [{"name": name} for name in names[:per_page]]}

    # -- messages: 5.6 to 5.14

    def post(self, name: str, body: Json) -> Json:
        entries = body.get("messages")
        if not isinstance(entries, list) or len(entries) > self._rules.max_post:
            raise Refused(400, f"messages must be a list of at most {self._rules.max_post}")
        checked: list[tuple[str, int]] = []  # all of them before any is stored (8.5)
        for entry in entries:
            if not isinstance(entry, dict) or not isinstance(entry.get("body"), str):
                raise Refused(400, "each message needs a body that is a string")
            checked.append((entry["body"], _integer(entry, "delay", 0, 0, MAX_DELAY_S)))
        queue, now, ids = self._created(name), self._clock(), []
        for text, delay in checked:
            self._seq += 1
            ids.append(str(FIRST_ID + self._seq))
            queue.add(Message(self._seq, ids[-1], text, now + delay, 0.0), now)
        return {"ids": ids, "msg": "Messages put on queue."}

    def reserve(self, name: str, body: Json) -> Json:
        queue = self.queue(name)
        n = _integer(body, "n", 1, 1, MAX_N)
        _integer(body, "wait", 0, 0, MAX_WAIT_S)  # the waiting is the server's
        timeout = self._timeout(body, queue)
        return {"messages": list(self._reserve(queue, n, timeout, bool(body.get("delete"))))}

    def _reserve(self, queue: Queue, n: int, timeout: int, delete: bool) -> Iterator[Json]:
        dead_letter = queue.settings.get("dead_letter")
        while n and (id := queue.ready.first()) is not None:
            message = queue.messages[id]
            if dead_letter and message.reserved_count >= dead_letter["max_reservations"]:
                # only ever here, with its id and count kept, and a new life (6.4)
                queue.remove(id)
                message.returned, message.visible_at = False, self._clock()
                self._created(dead_letter["queue_name"]).add(message, self._clock())
                continue
            self._lease(message, queue, timeout)
            if delete:
                queue.remove(id)
            yield message.view() | {"reservation_id": message.reservation_id}
            n -= 1

    def peek(self, name: str, query: Json) -> Json:
        queue = self.queue(name)
        n = _integer(_number(query, "n"), "n", 1, 1, MAX_N)
        return {"messages": [queue.messages[id].view() for id in queue.ready.smallest(n)]}

    def get(self, name: str, id: str) -> Json:
        return {"message": self.queue(name).find(id).view()}

    def delete(self, name: str, id: str, body: Json) -> Json:
        queue = self.queue(name)
        queue.remove(queue.deletable(id, body.get("reservation_id")).id)
        return {"msg": "Deleted"}

    def delete_many(self, name: str, body: Json) -> Json:
        """Without `ids` this empties the queue, whatever else the body holds (5.12)."""
        queue, entries = self.queue(name), body.get("ids")
        if entries is None or (entries == [] and self._rules.empty_ids == "clear"):
            queue.clear()
            return {"msg": "Cleared"}
        if not isinstance(entries, list) or len(entries) > MAX_N:
            raise Refused(400, f"ids must be a list of at most {MAX_N}")
        if not entries and self._rules.empty_ids == "reject":
            raise Refused(400, "ids must not be empty")
        if not all(isinstance(entry, dict) and "id" in entry for entry in entries):
            raise Refused(400, "each of ids must be an object with an id")
        good: set[str] = set()
        error: Refused | None = None
        for entry in entries:
            try:
                good.add(queue.deletable(str(entry["id"]), entry.get("reservation_id")).id)
            except Refused as refused:
                error = error or refused
        if error is None or self._rules.bulk_partial:
            for id in good:
                queue.remove(id)
        if error:
            raise error
        return {"msg": "Deleted"}

    def touch(self, name: str, id: str, body: Json) -> Json:
        queue = self.queue(name)
        message = queue.leased(id, body.get("reservation_id"))
        self._lease(message, queue, self._timeout(body, queue))
        return {"reservation_id": message.reservation_id, "msg": "Touched"}

    def release(self, name: str, id: str, body: Json) -> Json:
        queue, now = self.queue(name), self._clock()
        message = queue.leased(id, body.get("reservation_id"))
        message.give_back(now + _integer(body, "delay", 0, 0, MAX_DELAY_S))
        queue.place(message, now)
        return {"msg": "Released"}


def _integer(body: Json, key: str, default: int, least: int, most: int) -> int:
    """A whole number in range; absent and null mean the default."""
    value = body.get(key)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        raise Refused(400, f"{key} must be a whole number, {least}..{most}")
    return value


def _number(query: Json, key: str) -> Json:
    """A query's value as JSON would have it."""
    value = query.get(key, "")
    return {key: int(value) if value.isdecimal() else value} if value else {}


def _dead_letter(wanted: object, source: str) -> Json | None:
    """Settings of a dead-letter queue; an empty name switches it off (6.4)."""
    if not isinstance(wanted, dict) or not isinstance(wanted.get("queue_name"), str):
        raise Refused(400, "dead_letter needs a queue_name")
    most = _integer(wanted, "max_reservations", 10, 1, 1000)
    name = wanted["queue_name"]
    if name == source:
        raise Refused(400, "a queue cannot be its own dead-letter queue")
    return {"queue_name": name, "max_reservations": most} if name else None
