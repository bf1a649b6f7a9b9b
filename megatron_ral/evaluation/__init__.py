"""Held-out evaluation: prompts, responses, tables by category, probes and attention pictures."""
