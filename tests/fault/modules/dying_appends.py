"""An event module that makes each task of the group commit die before it appends."""

from datapipe.pipeline.group_commit import GroupCommit
from tests.fault.modules.patching import patch


async def _die(self: GroupCommit) -> None:
    raise RuntimeError("this task dies on purpose")


patch(GroupCommit, "_gather", _die)
