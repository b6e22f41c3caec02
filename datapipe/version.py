"""The version, in one place: `setup.cfg` reads it from here."""

__version__ = "2.0.0"
