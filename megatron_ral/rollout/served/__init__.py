"""Sampler in another Python environment: its server, the engine inside it, and our side of the connection."""
