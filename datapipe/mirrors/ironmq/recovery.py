"""The openers, by the path that `mirrors/__init__.py` names."""

from datapipe.mirrors.ironmq.mirror import check_ironmq, open_ironmq

__all__ = ["check_ironmq", "open_ironmq"]
