"""Command lines: one file each, from arguments to one call. `main.py` is the console script `megatron-ral COMMAND`."""
