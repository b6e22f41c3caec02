"""Bytes -> items: the lines of NDJSON, or the elements of a JSON array, in bounded memory."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from datapipe.cli.send.source import BrokenInput

# no service takes such an event, unless its `body_max_len` was raised
MAX_ITEM_BYTES = 8_388_608

_BLANK = b" \t\r\n"
_COMMA, _END = ord(","), ord("]")
_OPENS, _CLOSES = b"[{", b"]}"

# JSON at C speed and without backtracking: possessive quantifiers (`++`, `*+`)
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_FLAT = rb'[ \t\r\n]*+\{[^"{}\[\]]*+(?:%b[^"{}\[\]]*+)*+\}[ \t\r\n]*+,' % _STRING


def _up_to(these: bytes) -> re.Pattern[bytes]:
    """Up to and including the next of these that is not in a string."""
    pattern = rb'[^"%b]*+(?:%b[^"%b]*+)*+[%b]' % (these, _STRING, these, these)
    return re.compile(pattern, re.DOTALL)


_TO_BRACKET = _up_to(rb"\[\]{}")
_TO_COMMA_OR_BRACKET = _up_to(rb",\[\]{}")
_TO_COMMA = re.compile(_FLAT, re.DOTALL)


def array_start(head: bytes) -> int:
    """Behind the bracket that opens the array; 0: it is none."""
    blank = len(head) - len(head.lstrip(_BLANK))
    return blank + 1 if head[blank : blank + 1] == b"[" else 0


class Lines:
    """The lines of NDJSON.

    Args: grows: whoever writes it may not be done with its last line.
    Attributes: rest: that line, if it is not whole.
    """

    rest = b""

    def __init__(self, chunks: Iterator[bytes], name: str, *, grows: bool) -> None:
        self._chunks = chunks
        self._name = name
        self._grows = grows

    def __iter__(self) -> Iterator[list[bytes]]:
        rest = b""
        for chunk in self._chunks:
            lines = chunk.split(b"\n")
            lines[0] = rest + lines[0]
            rest = lines.pop()
            yield lines
            if len(rest) > MAX_ITEM_BYTES:
                raise _too_long(self._name, "a line")
        if rest.strip():
            if self._grows and not _is_json(rest):
                self.rest = rest
            else:
                yield [rest]


class Elements:
    """The elements of an array, from behind its bracket on, or from behind an element.

    Args: begun: some were read before, so that its end may have been as well.
    """

    rest = b""

    def __init__(self, chunks: Iterator[bytes], name: str, *, begun: bool) -> None:
        self._chunks = chunks
        self._name = name
        self._begun = begun

    def __iter__(self) -> Iterator[list[bytes]]:
        """Raises: BrokenInput: it is no array, or has no end."""
        buffer, start, at, depth = b"", 0, 0, 0
        found: list[bytes] = []
        while True:
            whole = None if depth or at > start else _TO_COMMA.match(buffer, at)
            step = whole or (_TO_BRACKET if depth else _TO_COMMA_OR_BRACKET).match(buffer, at)
            if step is None:
                yield found
                found, buffer, at, start = [], buffer[start:], at - start, 0
                if len(buffer) > MAX_ITEM_BYTES:
                    raise _too_long(self._name, "an element")
                if not (more := next(self._chunks, b"")):
                    break
                buffer += more
                continue
            at = step.end()
            byte = buffer[at - 1]
            if not depth and byte in (_COMMA, _END):
                found.append(buffer[start : at - 1])
                start, self._begun = at, False
                if byte == _END:
                    yield found
                    self._check_end(buffer[at:])
                    return
            else:
                depth += 1 if byte in _OPENS else -1
                if depth < 0:
                    yield found
                    raise BrokenInput(f"{self._name}: the array is broken: a bracket too many")
        if buffer.strip() or not self._begun:
            raise BrokenInput(f"{self._name}: the array has no end: it is cut off")

    def _check_end(self, rest: bytes) -> None:
        while not rest.strip():
            if not (rest := next(self._chunks, b"")):
                return
        raise BrokenInput(f"{self._name}: something follows the end of the array")


def _is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _too_long(name: str, what: str) -> BrokenInput:
    return BrokenInput(
        f"{name}: {what} has more than {MAX_ITEM_BYTES} bytes, which no event may have"
    )
