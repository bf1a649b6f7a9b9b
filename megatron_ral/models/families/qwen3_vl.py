"""Qwen3-VL (arXiv 2511.21631): q and k normalised per head, no bias; rotary axes interleaved over frequencies; features
of several depths of the vision tower enter the first language layers (DeepStack, arXiv 2406.04334); every temporal
patch of a video is a run of its own behind a time stamp in text.
"""

from typing import TYPE_CHECKING, Any, Sequence, cast

from megatron_ral.models.families.base import Family, TowerInputs, VisionTokens

if TYPE_CHECKING:
    import torch


class Qwen3VL(Family):
    """Rules of Qwen3-VL."""

    def tower_class(self) -> type:
        """Return the vision tower's class in transformers."""
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

        return Qwen3VLVisionModel

    def tower_inputs(self, tower: "torch.nn.Module", grids: "torch.Tensor") -> TowerInputs:
        """Return the positions, and the learned positions between which each patch lies, with their weights."""
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        inputs, of = super().tower_inputs(tower, grids), cast(Any, tower)
        indices, weights = get_vision_interpolation_indices_and_weights(
            grids,
            of.num_grid_per_side,
            mode=of.interpolation_mode,
            align_corners=of.interpolation_align_corners,
            spatial_merge_size=of.spatial_merge_size,
        )
        return TowerInputs({**inputs.tensors, "interp_indices": indices, "interp_weights": weights}, inputs.segments)

    def counted_size(
        self, num_frames: int, height: int, width: int, *, temporal_patch_size: int, token_side: int
    ) -> tuple[int, int, int]:
        """Return whole temporal patches of frames, and a frame that is at least one token wide and high.

        Source: smart_resize of Qwen3VLVideoProcessor in transformers 5.23.
        """
        frames = round(max(num_frames, temporal_patch_size) / temporal_patch_size) * temporal_patch_size
        if (small := min(height, width)) < token_side:
            height, width = int(height * (token_side / small)), int(width * (token_side / small))
        return frames, height, width

    def video_placeholder(self, tokens: VisionTokens) -> str:
        """Return the video token with the pair of tokens around it.

        Qwen3-VL's processor replaced all three in transformers 4.57. Version 5 replaces the video token alone and keeps
        the outer pair.
        """
        return tokens.start + tokens.video + tokens.end

    def video_text(self, tokens: VisionTokens, run_lengths: Sequence[int], stamps: Sequence[float]) -> str:
        """Return one time stamp and one run of visual tokens per temporal patch."""
        return "".join(
            f"<{stamp:.1f} seconds>{tokens.start}{tokens.video * length}{tokens.end}"
            for stamp, length in zip(stamps, run_lengths)
        )


QWEN3_VL = Qwen3VL(
    "qwen3_vl",
    qkv_bias=False,
    qk_norm=True,
    interleaved_rotary=True,
    hub_prefixes=(("model.", "model.language_model."), ("visual.", "model.visual.")),
    timed_video=True,
    vllm_issue="",
)
