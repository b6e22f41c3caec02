"""NATS JetStream as the mirror, shared by processes on several machines."""
