"""datapipe takes JSON events by HTTP POST and loads them into a database: none lost, none twice."""

from typing import TYPE_CHECKING, Any

from datapipe.version import __version__

if TYPE_CHECKING:
    from datapipe.app import create_app
    from datapipe.events.types import Event, register

__all__ = ["Event", "__version__", "create_app", "register"]


def __getattr__(name: str) -> Any:
    """Imported once they are asked for: commands and event classes do without the service, and
    `python -m datapipe` where nothing is installed can say so.
    """
    if name == "create_app":
        from datapipe.app import create_app

        return create_app
    if name in ("Event", "register"):
        from datapipe.events import types

        return getattr(types, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
