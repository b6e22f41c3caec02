"""The bytes of one input: plain, gzip or zstd, told by content; unpacked in bounded steps."""

from __future__ import annotations

import codecs
import fcntl
import os
import select
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datapipe.errors import DatapipeError

HEAD_BYTES = 65_536  # unpacked: what tells one input from another
STDIN = "-"

_READ_BYTES = 262_144  # packed, at a time
_STEP_BYTES = 1_048_576  # unpacked, at a time
_LOOK_S = 0.2  # until the reader of a pipe that gives nothing asks whether it is to stop
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # Sources: RFC 1952, 2.3.1; RFC 8878, 3.1.1


class BrokenInput(DatapipeError):
    """The input can't be read on from where it is."""


class Source:
    """One input, read by one thread. A file is locked against a second `datapipe send`.

    Attributes:
        name: for people; the absolute path, or `-`.
        size: packed bytes, where that is known.
        again: it is a file, which can be read more than once.
        taken: packed bytes read so far.
        stopped: set it, and whoever reads gets `BrokenInput` soon.
    """

    def __init__(self, name: str) -> None:
        """Raises: OSError; DatapipeError: another one sends it."""
        self.name = name if name == STDIN else os.path.abspath(name)
        self.taken = 0
        self.stopped = False
        self._fd = sys.stdin.fileno() if name == STDIN else os.open(name, os.O_RDONLY)
        try:
            self.again = name != STDIN and Path(name).is_file()
            self.size = os.fstat(self._fd).st_size if self.again else None
            self._lock()
            self._chunks = self._without_bom()
            self.head = self._head()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.name != STDIN:
            os.close(self._fd)

    def _lock(self) -> None:
        """Two at once would cut a file that grows at different places, and send lines twice."""
        if not self.again:
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DatapipeError(f"{self.name}: another `datapipe send` is sending it") from None
        except OSError:  # a file system without locks
            pass

    def _head(self) -> bytes:
        """The first 64 KiB, unpacked; they are given again."""
        first: list[bytes] = []
        while sum(map(len, first)) < HEAD_BYTES and (chunk := next(self._chunks, b"")):
            first.append(chunk)
        self._first = b"".join(first)
        return self._first[:HEAD_BYTES]

    def chunks(self, start: int) -> Iterator[bytes]:
        """All from this offset of what is unpacked; more than once only if `again`.

        Raises: BrokenInput: also if it is shorter than that.
        """
        skip = start
        for chunk in self._all(start):
            if skip >= len(chunk):
                skip -= len(chunk)
            else:
                yield chunk[skip:]
                skip = 0
        if skip > 1:  # the last line may lack its line feed
            raise BrokenInput(f"{self.name} is shorter than what was sent of it")

    def _all(self, start: int) -> Iterator[bytes]:
        first, self._first = self._first, b""
        if not first:  # it has been read before
            os.lseek(self._fd, 0, os.SEEK_SET)
            self.taken = 0
            self._chunks = self._without_bom()
        yield first
        yield from self._chunks

    def _without_bom(self) -> Iterator[bytes]:
        """What Windows puts before UTF-8 becomes blanks: offsets stay as they are."""
        chunks = self._unpacked()
        first, bom = next(chunks, b""), codecs.BOM_UTF8
        yield b" " * len(bom) + first[len(bom) :] if first.startswith(bom) else first
        yield from chunks

    def _unpacked(self) -> Iterator[bytes]:
        start = b""
        while len(start) < len(_ZSTD) and (more := self._read()):
            start += more
        if start.startswith(_GZIP):
            yield from self._frames(start, _Gzip)
        elif start.startswith(_ZSTD):
            yield from self._frames(start, _zstd())
        else:
            while start:
                yield start
                start = self._read()

    def _frames(self, packed: bytes, opener: Callable[[], Any]) -> Iterator[bytes]:
        """Of packed data, which may be several pieces, one behind the other."""
        while packed := packed.lstrip(b"\0") or self._read().lstrip(b"\0"):  # tapes pad with zeros
            unpacker = opener()
            while not unpacker.eof:
                try:
                    step = unpacker.decompress(packed, _STEP_BYTES)
                except Exception as exc:  # zlib.error, ZstdError
                    raise BrokenInput(f"{self.name}: its packed data is broken: {exc}") from exc
                packed = b""
                if step:
                    yield step
                if unpacker.needs_input and not unpacker.eof and not (packed := self._read()):
                    raise BrokenInput(f"{self.name}: its packed data is cut off")
            packed = unpacker.unused_data

    def _read(self) -> bytes:
        while True:
            if self.stopped:
                raise BrokenInput(f"{self.name}: stopped")
            if self.again or select.select([self._fd], [], [], _LOOK_S)[0]:
                break
        try:
            data = os.read(self._fd, _READ_BYTES)
        except OSError as exc:
            raise BrokenInput(f"{self.name} can't be read: {exc.strerror}") from exc
        self.taken += len(data)
        return data


class _Gzip:
    """zlib's decompressor, asked as that of zstd is."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(31)  # Source: zlib manual, inflateInit2: a gzip header
        self.needs_input = True

    def decompress(self, packed: bytes, max_length: int) -> bytes:
        step = self._zlib.decompress(self._zlib.unconsumed_tail + packed, max_length)
        self.needs_input = len(step) < max_length and not self._zlib.unconsumed_tail
        return step

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data


def _zstd() -> Callable[[], Any]:
    if sys.version_info >= (3, 14):
        from compression.zstd import ZstdDecompressor
    else:
        from backports.zstd import ZstdDecompressor
    return ZstdDecompressor
