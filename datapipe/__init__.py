"""datapipe takes JSON events by HTTP POST and loads them into a database: none lost, none twice."""

from datapipe.app import create_app
from datapipe.events.types import Event, register
from datapipe.version import __version__

__all__ = ["Event", "__version__", "create_app", "register"]
