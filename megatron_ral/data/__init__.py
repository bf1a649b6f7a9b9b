"""Shards -> samples -> prompts. The only knowledge of ranks are the two integers `dp_rank` and `dp_size`."""
