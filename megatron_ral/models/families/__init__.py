"""Model families: one file each, and this registry.

A new family that resembles one of these takes a file beside `qwen3_vl.py` and an entry in `FAMILIES`. No other module
compares a family's name.
"""

from typing import TYPE_CHECKING, Optional

from megatron_ral.errors import ConfigError
from megatron_ral.models.families.base import Family, PatchRules, VisionTokens
from megatron_ral.models.families.internvl import INTERNVL
from megatron_ral.models.families.qwen2_5_vl import QWEN2_5_VL
from megatron_ral.models.families.qwen3_5 import QWEN3_5
from megatron_ral.models.families.qwen3_vl import QWEN3_VL

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

__all__ = ["FAMILIES", "Family", "PatchRules", "VisionTokens", "build_tower", "find_family"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (QWEN2_5_VL, QWEN3_VL, QWEN3_5, INTERNVL)}


def find_family(model_type: str, key: str, value: object = None) -> Family:
    """Return the family of a checkpoint.

    Args:
        model_type: entry of that name in the checkpoint's `config.json`.
        key: setting, option or quoted path that names the checkpoint, for the error.
        value: value of the setting, for the error.

    Raises:
        ConfigError: an unknown `model_type`.
    """
    if model_type not in FAMILIES:
        raise ConfigError(key, value, f"is a '{model_type}' model; known families: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def build_tower(vision: "PretrainedConfig", dtype: Optional["torch.dtype"] = None) -> "torch.nn.Module":
    """Build the vision tower that a vision config describes, weights random; see `Family.build_tower`.

    Raises:
        ConfigError: a vision config of no known family.
    """
    for family in FAMILIES.values():
        if vision.model_type.startswith(family.model_type):
            return family.build_tower(vision, dtype)
    raise ConfigError("vision_config.model_type", vision.model_type, f"is none of {', '.join(FAMILIES)}")
