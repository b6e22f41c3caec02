"""A host of its own for a service: a network namespace, and a link to it that can be cut.

What is cut says nothing: no FIN, no RST, as when a host loses power. Needs root and iproute2.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

_NUMBERS = iter(range(0, 256, 4))


class Link:
    """Attributes: here, there: the addresses of its two ends. inside: words before a command."""

    def __init__(self) -> None:
        net = f"10.{200 + os.getpid() // 256 % 50}.{os.getpid() % 256}"
        number = next(_NUMBERS)
        self.here, self.there = f"{net}.{number + 1}", f"{net}.{number + 2}"
        self._name = f"dp{os.getpid()}x{number}"
        self.inside = ("ip", "netns", "exec", self._name)

    @classmethod
    @contextmanager
    def up(cls) -> Iterator[Link]:
        link = cls()
        name, end = link._name, f"{link._name}p"
        _ip("netns", "add", name)
        try:
            _ip("link", "add", name, "type", "veth", "peer", "name", end, "netns", name)
            _ip("address", "add", f"{link.here}/30", "dev", name)
            _ip("link", "set", name, "up")
            _ip("-n", name, "address", "add", f"{link.there}/30", "dev", end)
            _ip("-n", name, "link", "set", end, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            yield link
        finally:
            _ip("netns", "del", name)  # and both ends with it

    def cut(self) -> None:
        """From now on nothing arrives, on either side; this side's addresses stay."""
        _ip("-n", self._name, "link", "set", f"{self._name}p", "down")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
