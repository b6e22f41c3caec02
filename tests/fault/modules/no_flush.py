"""An event module that breaks the journal on purpose: it is not flushed any more."""

from datapipe.mirrors.journal.mirror import JournalFile
from tests.fault.modules.patching import patch

_open = JournalFile._open


def _open_without_flush(self: JournalFile) -> None:
    _open(self)
    self._write.execute("PRAGMA synchronous=OFF")


patch(JournalFile, "_open", _open_without_flush)
