"""Event types, their rows, and the segment: what moves through the pipeline. No I/O."""
