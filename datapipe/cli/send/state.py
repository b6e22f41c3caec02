"""What is known of an input between two runs: how far it is sent, and what was refused.

    FILE.datapipe-sent    how far: one JSON object, written anew as a whole
    FILE.refused          an NDJSON line for each item that was refused

The order of writes is what a run that dies leans on: refusals are flushed before the state that
says they are told, the state is flushed before anything is sent that only it can cut again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO

import msgspec

from datapipe.cli.send.cut import Mark, Refusal
from datapipe.errors import DatapipeError


class State(msgspec.Struct):
    """How far an input is sent.

    Attributes:
        id: what the keys are made of.
        url: of the service.
        head: hash of its first `head_bytes` bytes (unpacked).
        advanced_at: when `done` last went on. What comes behind it may have been sent then, so a
            run that gets no answer makes those keys no younger.
        done: all before it is answered.
        reached: so is what comes between, but that of the lanes in `behind`.
        behind: by lane: all of it before here is answered.
        cuts: offsets at which the input ended once.
        whole: all that there was is answered.
    """

    id: str
    url: str
    head: str
    head_bytes: int
    advanced_at: datetime
    done: Mark
    reached: Mark
    behind: dict[str, Mark] = {}
    cuts: list[int] = []
    whole: bool = False

    def since(self, lane: str) -> Mark:
        """All of this lane that comes before is answered."""
        return self.behind.get(lane, self.reached)


def fingerprint(data: bytes) -> str:
    """A hash, for keys as well as for files."""
    return hashlib.sha256(data).hexdigest()[:32]


class StateFile:
    """Args: path: None: there is none, and nothing is remembered."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def read(self) -> State | None:
        """None: there is none yet. Raises: DatapipeError: it can't be read."""
        if self.path is None:
            return None
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=State)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise DatapipeError(
                f"the state file {self.path} can't be read: {exc.strerror}"
            ) from exc
        except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
            raise DatapipeError(f"{self.path} is not a state file of datapipe: {exc}") from exc

    def write(self, state: State) -> None:
        """Returns once it is flushed; whoever reads finds the old one or the new one, whole.

        Raises: DatapipeError: it can't be written.
        """
        if self.path is None:
            return
        new = self.path.with_name(f"{self.path.name}.new")
        try:
            with new.open("wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as exc:
            why = f"the state file {self.path} can't be written: {exc.strerror}"
            raise DatapipeError(f"{why}; --state names another") from exc


class RefusedFile:
    """Where refused items are kept; it is made when the first is.

    Args:
        anew: what it holds is of an earlier time.
        since: number of the first item whose refusals may be in it already.
    """

    def __init__(self, path: Path, *, anew: bool, since: int) -> None:
        self.path = path
        self._anew = anew
        self._torn = False  # by a crash
        self._known = set() if anew else self._numbers(since)
        self._file: IO[bytes] | None = None

    def _numbers(self, since: int) -> set[int]:
        found: set[int] = set()
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            for line in file:
                self._torn = not line.endswith(b"\n")
                with suppress(msgspec.MsgspecError, UnicodeDecodeError):
                    number = msgspec.json.decode(line, type=_Line).line
                    if number >= since:
                        found.add(number)
        return found

    def add(self, refusals: Iterable[Refusal]) -> None:
        """Keep those that are not kept yet. Raises: OSError."""
        lines = [_line(refusal) for refusal in refusals if refusal.number not in self._known]
        if lines:
            if self._file is None:
                self._file = self.path.open("wb" if self._anew else "ab")
                if self._torn:
                    lines.insert(0, b"")
            self._file.write(b"\n".join(lines) + b"\n")

    def flush(self) -> None:
        """Returns once all is on disk. Raises: OSError."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _Line(msgspec.Struct):
    line: int


def _line(refusal: Refusal) -> bytes:
    """As JSON on one line: what was an object stands there as it was, else its text."""
    event: msgspec.Raw | str
    try:
        event = msgspec.Raw(msgspec.json.format(refusal.item.decode(), indent=-1).encode())
        msgspec.json.decode(event)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        event = refusal.item.decode(errors="backslashreplace")
    return msgspec.json.encode(
        {
            "line": refusal.number, "status_code": refusal.code,
            "status_message": refusal.message, "event": event,
        }
    )  # fmt: skip
