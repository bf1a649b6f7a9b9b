"""What differs between the language models of the families this project knows, in one table.

Qwen2.5-VL (arXiv 2502.13923): biased q, k, v; rotary axes in blocks of frequencies; a video is one run of visual tokens
whose temporal positions are seconds.
Qwen3-VL (arXiv 2511.21631): q and k normalised per head, no bias; rotary axes interleaved over frequencies; features of
several depths of the vision tower enter the first language layers (DeepStack, arXiv 2406.04334); every temporal patch
of a video is a run of its own behind a time stamp in text.
"""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face."""

    model_type: str
    qkv_bias: bool
    qk_norm: bool
    interleaved_rotary: bool
    """Rotary axes t, h, w alternate over frequencies instead of holding one block each."""
    hub_prefixes: tuple[tuple[str, str], ...]
    """(our prefix, prefix on the hub) of weight names."""

    def hub_name(self, name: str) -> str:
        """Name of a weight on the hub, from the project's own."""
        for ours, theirs in self.hub_prefixes:
            if name.startswith(ours):
                return theirs + name[len(ours) :]
        return name


FAMILIES = {
    family.model_type: family
    for family in (
        Family("qwen2_5_vl", qkv_bias=True, qk_norm=False, interleaved_rotary=False, hub_prefixes=()),
        Family(
            "qwen3_vl",
            qkv_bias=False,
            qk_norm=True,
            interleaved_rotary=True,
            hub_prefixes=(("model.", "model.language_model."), ("visual.", "model.visual.")),
        ),
    )
}


def build_tower(vision: PretrainedConfig, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """Vision tower of a checkpoint, Hugging Face's own module, weights random.

    Called as `tower(pixels, grid_thw=grids)` it returns `pooler_output` [visual tokens, hidden] and, where the family
    has them, `deepstack_features`, a list of the same shape.
    """
    if vision.model_type.startswith("qwen3_vl"):
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel as Tower
    else:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Tower
    return Tower._from_config(vision, dtype=dtype)
