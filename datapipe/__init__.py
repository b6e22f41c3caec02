"""datapipe takes JSON events by HTTP POST and loads them into a database: none lost, none twice."""

from typing import TYPE_CHECKING, Any

from datapipe.events.types import Event, register
from datapipe.version import __version__

if TYPE_CHECKING:
    from datapipe.app import create_app

__all__ = ["Event", "__version__", "create_app", "register"]


def __getattr__(name: str) -> Any:
    """The service is imported once it is asked for: commands and event classes do without."""
    if name == "create_app":
        from datapipe.app import create_app

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
