"""Targets of the attention divergence, one file each."""
