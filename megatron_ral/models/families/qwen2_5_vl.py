"""Qwen2.5-VL (arXiv 2502.13923): biased q, k, v; rotary axes in blocks of frequencies; a video is one run of visual
tokens whose temporal positions are seconds.
"""

from typing import TYPE_CHECKING, Any, Optional, cast

from megatron_ral.models.families.base import Family, TowerInputs

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


class Qwen2_5VL(Family):
    """Rules of Qwen2.5-VL."""

    def tower_class(self) -> type:
        """Return the vision tower's class in transformers."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

        return Qwen2_5_VisionTransformerPretrainedModel

    def build_tower(self, vision: "PretrainedConfig", dtype: Optional["torch.dtype"] = None) -> "torch.nn.Module":
        """Build the tower, most of whose blocks attend inside windows."""
        tower: Any = super().build_tower(vision, dtype)
        for index, block in enumerate(tower.blocks):
            block.attn.segments = "frames" if index in tower.fullatt_block_indexes else "windows"
        return tower

    def tower_inputs(self, tower: "torch.nn.Module", grids: "torch.Tensor") -> TowerInputs:
        """Return the positions, and the order of the tokens in which windows are consecutive."""
        from transformers.vision_utils import get_vision_window_index

        inputs, of = super().tower_inputs(tower, grids), cast(Any, tower)
        order, bounds = get_vision_window_index(grids, of.spatial_merge_size, of.window_size, of.patch_size)
        return TowerInputs(
            {**inputs.tensors, "window_index": order}, {**inputs.segments, "windows": bounds.diff().tolist()}
        )

    def temporal_interval(self, vision: "PretrainedConfig", seconds: float) -> float:
        """Return tokens per second times seconds per patch, in float32 because transformers computes it so."""
        import torch

        return float(getattr(vision, "tokens_per_second", 1) * torch.tensor(seconds))

    def stock_video_inputs(self, seconds_per_grid: "torch.Tensor") -> dict[str, Any]:
        """Return the seconds per temporal patch, which this family's positions depend on."""
        return {"second_per_grid_ts": seconds_per_grid}


QWEN2_5_VL = Qwen2_5VL("qwen2_5_vl", qkv_bias=True, qk_norm=False, interleaved_rotary=False, vllm_issue="")
