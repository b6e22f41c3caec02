"""IronMQ as the mirror."""
