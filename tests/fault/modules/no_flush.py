"""An event module that breaks the journal on purpose: it is not flushed any more."""

from datapipe.mirrors.journal import JournalFile

_open = JournalFile._open


def _open_without_flush(self: JournalFile) -> None:
    _open(self)
    self._write.execute("PRAGMA synchronous=OFF")


JournalFile._open = _open_without_flush  # type: ignore[method-assign]
