"""A policy that can generate, run forward, be updated: ZeRO-3 under megatron-core's 1F1B. Knows nothing of RAL."""
