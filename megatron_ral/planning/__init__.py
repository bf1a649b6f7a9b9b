"""Plans of a launch before it starts: memory, traffic and time of every rank, and a comparison of all ranks."""
