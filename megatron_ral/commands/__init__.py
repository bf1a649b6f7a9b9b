"""Command lines: one file each, from arguments to one call."""
