"""An event module: the journal can't be written while a file `read-only` lies beside it."""

from datapipe.mirrors.journal.file import JournalFile
from tests.fault.modules.patching import patch


def _while_allowed(name: str) -> None:
    call = getattr(JournalFile, name)

    def checked(self: JournalFile, segments: object) -> None:
        shut = (self.path.parent / "read-only").exists()
        self._write.execute(f"PRAGMA query_only={int(shut)}")
        call(self, segments)

    patch(JournalFile, name, checked)


_while_allowed("append")
_while_allowed("remove")
