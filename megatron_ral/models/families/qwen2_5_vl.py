"""Qwen2.5-VL (arXiv 2502.13923): biased q, k, v; rotary axes in blocks of frequencies; a video is one run of visual
tokens whose temporal positions are seconds.
"""

from typing import TYPE_CHECKING, Any

from megatron_ral.models.families.base import Family

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


class Qwen2_5VL(Family):
    """Rules of Qwen2.5-VL."""

    def tower_class(self) -> type:
        """Return the vision tower's class in transformers."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

        return Qwen2_5_VisionTransformerPretrainedModel

    def temporal_interval(self, vision: "PretrainedConfig", seconds: float) -> float:
        """Return tokens per second times seconds per patch, in float32 because transformers computes it so."""
        import torch

        return float(getattr(vision, "tokens_per_second", 1) * torch.tensor(seconds))

    def stock_video_inputs(self, seconds_per_grid: "torch.Tensor") -> dict[str, Any]:
        """Return the seconds per temporal patch, which this family's positions depend on."""
        return {"second_per_grid_ts": seconds_per_grid}


QWEN2_5_VL = Qwen2_5VL("qwen2_5_vl", qkv_bias=True, qk_norm=False, interleaved_rotary=False)
