"""A deterministic simulator of many streams on one pool, an independent checker of its event log, and metrics."""
