"""Loggers of a run: scalars, pictures and texts, throughput, and the page of charts."""
