"""Weights on disk: Hugging Face and Megatron folders, conversion between layouts, loading and export of a stage."""
