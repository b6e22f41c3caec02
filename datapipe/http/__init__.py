"""HTTP: how events come in, and what people and programs are shown."""
