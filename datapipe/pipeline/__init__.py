"""The pipeline: buffer, group commit, loader, and what looks after them."""
