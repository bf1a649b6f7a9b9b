"""Held-out evaluation: prompts, tables by category, probes and pictures of attention."""
