"""An event module that lets go of idempotency keys at once when their time is up."""

from datapipe import housekeeping
from datapipe.sinks import database

assert (housekeeping.BEAT_S, database._BEAT_SLACK_S) == (5.0, 15.0)
housekeeping.BEAT_S = 0.1
database._BEAT_SLACK_S = 0.0
