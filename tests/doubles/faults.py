"""Faults on order for a stand-in server: the next N calls of a kind, or each with a probability."""

import random
from dataclasses import dataclass
from typing import Literal, get_args

What = Literal["408", "500", "503", "504", "reset", "cut", "slow", "late", "duplicate", "expire"]
"""
408, 500        JSON error       503, 504   HTML error, as the proxy in front would send (2)
reset           the connection is reset instead of an answer
cut             reset in the middle of the answer's body
slow            half of the body, `seconds`, the other half
late            the answer comes `seconds` later
duplicate       a post is stored twice, under other ids
expire          all reservations end before the call takes effect
"""
INSTEAD = ("408", "500", "503", "504", "reset")  # these come before the effect, unless told `after`


@dataclass(slots=True)
class Fault:
    """What goes wrong with a call, or with any. `after`: once it has taken effect."""

    what: What
    after: bool = False
    call: str = ""
    n: int = 0
    rate: float = 0.0
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.what not in get_args(What):
            raise ValueError(f"no such fault: {self.what}")
        if self.what == "duplicate":
            self.call = "post"
        if not self.rate:
            self.n = max(self.n, 1)


class Faults:
    """Faults on order: those counted come first, in the order given, then those with a rate."""

    def __init__(self, seed: int = 0) -> None:
        self.ordered: list[Fault] = []
        self._random = random.Random(seed)

    def next(
        self, what: What, n: int = 1, *, call: str = "", after: bool = False, seconds: float = 1.0
    ) -> None:
        """The next `n` calls, or calls of that kind, fail so."""
        self.ordered.append(Fault(what, after, call, n=n, seconds=seconds))

    def rate(
        self, what: What, rate: float, *, call: str = "", after: bool = False, seconds: float = 1.0
    ) -> None:
        """Each call, or each of that kind, fails so with this probability; 1.0 is always."""
        self.ordered.append(Fault(what, after, call, rate=rate, seconds=seconds))

    def clear(self) -> None:
        self.ordered.clear()

    def take(self, call: str) -> Fault | None:
        matching = [fault for fault in self.ordered if fault.call in ("", call)]
        for fault in matching:
            if fault.n:
                fault.n -= 1
                if not fault.n:
                    self.ordered.remove(fault)
                return fault
        return next((fault for fault in matching if self._random.random() < fault.rate), None)
