"""Hosts for the nodes of a cluster: network namespaces on a bridge, and disks of their own.

A link that is cut says nothing: no FIN, no RST. A disk is a file system in an image, so that it can
be filled, and can lose power: what was not flushed is not in the copy that it goes on with. Needs
root and iproute2.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

_NUMBERS = count()
_DISK_BYTES = 400 * 2**20
_NOBODY = "02:00:00:00:00:01"  # a hardware address that no host has


class Disk:
    """Attributes: folder: where it is mounted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._image = folder.with_suffix(".image")
        self._filling = folder / "filling"

    @classmethod
    @contextmanager
    def mounted(cls, folder: Path) -> Iterator[Disk]:
        disk = cls(folder)
        folder.mkdir(parents=True)
        with disk._image.open("wb") as image:
            image.truncate(_DISK_BYTES)
        _run("mkfs.ext4", "-q", "-m", "0", str(disk._image))
        disk._mount()
        try:
            yield disk
        finally:
            with suppress(subprocess.CalledProcessError):  # the copy was not mounted
                disk._unmount()

    def _mount(self) -> None:
        _run("mount", "-o", "loop", str(self._image), str(self.folder))

    def _unmount(self) -> None:
        _run("umount", "-l", str(self.folder))

    def fill(self) -> None:
        """Leave no byte free."""
        with self._filling.open("ab", buffering=0) as file, suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self.folder).free - 2**20)
        with self._filling.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError as exc:
                if exc.errno != errno.ENOSPC:
                    raise

    def empty(self) -> None:
        """What filled it is gone."""
        self._filling.unlink()

    def copy(self) -> None:
        """What is on it now, without what was not flushed."""
        copy = self._image.with_suffix(".copy")
        _run("cp", "--sparse=always", "--reflink=never", str(self._image), str(copy))

    def lose_power(self) -> None:
        """Go on with the last copy. Nobody may have a file open there."""
        self._unmount()
        self._image.with_suffix(".copy").replace(self._image)
        self._mount()


def power_cut(disks: Sequence[Disk]) -> None:
    """All lose power at once. Who writes there has been killed."""
    for disk in disks:
        disk.copy()
    for disk in disks:
        disk.lose_power()


class Network:
    """So many hosts and this one on a bridge.

    Attributes: addresses: of the hosts. inside: words before a command, for each.
    """

    def __init__(self, hosts: int) -> None:
        self._name = f"dp{os.getpid() % 100_000}n{next(_NUMBERS)}"
        self._net = f"10.{100 + os.getpid() // 256 % 100}.{os.getpid() % 256}"
        start = 16 * (next(_NUMBERS) % 15)
        self.here = f"{self._net}.{start + 1}"
        self.addresses = [f"{self._net}.{start + 2 + host}" for host in range(hosts)]
        self._hosts = [f"{self._name}h{host}" for host in range(hosts)]
        self.inside = [("ip", "netns", "exec", name) for name in self._hosts]

    @classmethod
    @contextmanager
    def up(cls, hosts: int) -> Iterator[Network]:
        network = cls(hosts)
        bridge = network._name
        with ExitStack() as stack:
            _ip("link", "add", bridge, "type", "bridge")
            stack.callback(_ip, "link", "del", bridge)
            _ip("address", "add", f"{network.here}/28", "dev", bridge)
            _ip("link", "set", bridge, "up")
            for name, address in zip(network._hosts, network.addresses, strict=True):
                _ip("netns", "add", name)
                stack.callback(_ip, "netns", "del", name)
                _ip("link", "add", name, "type", "veth", "peer", "name", "eth", "netns", name)
                _ip("link", "set", name, "master", bridge)
                _ip("link", "set", name, "up")
                _ip("-n", name, "address", "add", f"{address}/28", "dev", "eth")
                _ip("-n", name, "link", "set", "eth", "up")
                _ip("-n", name, "link", "set", "lo", "up")
            yield network

    def cut(self, host: int) -> None:
        """Nothing reaches it any more, and nothing comes from it."""
        _ip("link", "set", self._hosts[host], "nomaster")

    def join(self, host: int) -> None:
        """Undo `cut`."""
        _ip("link", "set", self._hosts[host], "master", self._name)

    def part(self, host: int) -> None:
        """Cut it off from the other hosts; this one still reaches it."""
        for other in self._others(host):
            self._neighbour("replace", host, other)
            self._neighbour("replace", other, host)

    def unite(self, host: int) -> None:
        """Undo `part`."""
        for other in self._others(host):
            self._neighbour("del", host, other)
            self._neighbour("del", other, host)

    def _others(self, host: int) -> list[int]:
        return [other for other in range(len(self._hosts)) if other != host]

    def _neighbour(self, what: str, host: int, other: int) -> None:
        """What a host sends to another goes to nobody, or it asks anew where that is."""
        to = ("lladdr", _NOBODY, "nud", "permanent") if what == "replace" else ()
        address = self.addresses[other]
        _ip("-n", self._hosts[host], "neigh", what, address, *to, "dev", "eth")


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)
