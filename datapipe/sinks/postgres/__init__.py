"""PostgreSQL as the sink."""
