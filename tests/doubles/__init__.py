"""Stand-ins for services, as small real servers on port 0."""
