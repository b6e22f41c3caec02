"""An event module that makes a load wait for a lock 0.3 s, not 10 s."""

from datapipe.sinks import postgres

assert "lock_timeout = '10s'" in postgres._BEGIN, "what this changes is no longer told"
postgres._BEGIN = postgres._BEGIN.replace("lock_timeout = '10s'", "lock_timeout = '300ms'")
