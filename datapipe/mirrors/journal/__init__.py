"""The journal: segments in a local SQLite file."""
