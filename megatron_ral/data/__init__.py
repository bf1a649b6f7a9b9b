"""Shards -> samples -> prompts. Knows ranks only as the two integers dp_rank and dp_size."""
