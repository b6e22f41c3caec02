"""An event module: who is dead is told in two seconds, not in thirty; leases and looks are real."""

from datapipe import housekeeping

for _name, _seconds in (("BEAT_S", 0.2), ("SILENT_S", 2.0), ("_FIRST_PAUSE_S", 0.5)):
    getattr(housekeeping, _name)  # it must be there
    setattr(housekeeping, _name, _seconds)
