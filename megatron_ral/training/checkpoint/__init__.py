"""Checkpoints: writing, restoring in any layout, and reading their weights without a run."""
