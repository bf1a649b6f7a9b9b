"""Reinforced Attention Learning for multimodal LLMs: megatron-core stages under DeepSpeed ZeRO-3."""

__version__ = "0.2.0"
