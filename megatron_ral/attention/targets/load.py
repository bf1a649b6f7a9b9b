"""Lookup of a target's mathematics by its name."""

import importlib

from megatron_ral.attention.targets.base import AttentionTarget


def load_target(name: str) -> AttentionTarget:
    """Return the target of a name of `registry.TARGETS`, which is the name of its file too."""
    return importlib.import_module(f"megatron_ral.attention.targets.{name}").TARGET
