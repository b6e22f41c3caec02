"""SQLite as the sink."""
