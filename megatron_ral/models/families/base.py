"""The interface of a model family: all that differs between the families that this project trains.

A family has one file beside this one and one line in the registry (`__init__.py`). Everything here is pure and cheap to
import: torch and transformers are imported inside methods. The defaults are the rules of Qwen2.5-VL, so that another
family states only where it departs from them.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional, Sequence, cast

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class VisionTokens:
    """Text of the special tokens around and inside visual input."""

    image: str
    """Placeholder of one visual token of an image."""
    video: str
    """Placeholder of one visual token of a video."""
    start: str
    """Token before a run of visual tokens."""
    end: str
    """Token after a run of visual tokens."""


@dataclass(frozen=True)
class TowerInputs:
    """Inputs of a vision tower that follow from sizes alone, in host memory."""

    tensors: dict[str, "torch.Tensor"]
    """Keyword arguments of the tower's forward pass, which transformers would compute where the pixels are."""
    segments: dict[str, list[int]]
    """Patches of each segment inside which attention is computed, by name: "frames", and "windows" where a family has
    them (see `models/packed_attention.py`)."""


@dataclass(frozen=True)
class Family:
    """Model family, named by the `model_type` of Hugging Face's `config.json`."""

    model_type: str
    qkv_bias: bool
    """Presence of a bias in the projections of queries, keys and values."""
    qk_norm: bool
    """Presence of an RMSNorm on queries and keys, per head."""
    interleaved_rotary: bool
    """Layout of the rotary axes t, h, w: alternating over frequencies, or (False) one block of frequencies each."""
    hub_prefixes: tuple[tuple[str, str], ...] = ()
    """Pairs (our prefix, prefix on the hub) of weight names."""
    end_of_turn: str = "<|im_end|>"
    """Token that ends a response."""
    timed_video: bool = False
    """Form of a video in the prompt: one run of visual tokens per temporal patch, each behind a time stamp in text
    (True), or a single run for the whole video (False)."""

    def hub_name(self, name: str) -> str:
        """Return the name that a weight has on the hub, given our own."""
        for ours, theirs in self.hub_prefixes:
            if name.startswith(ours):
                return theirs + name[len(ours) :]
        return name

    def tower_class(self) -> type:
        """Return the vision tower's class in transformers."""
        raise NotImplementedError

    def build_tower(self, vision: "PretrainedConfig", dtype: Optional["torch.dtype"] = None) -> "torch.nn.Module":
        """Build the vision tower of a checkpoint: Hugging Face's own module with random weights and our attention.

        A call `tower(pixels, grid_thw=grids)` returns `pooler_output` [visual tokens, hidden] and, in families with
        DeepStack, `deepstack_features`, a list of tensors of the same shape.

        Args:
            vision: `vision_config` of the checkpoint.
            dtype: precision of the parameters; None: torch's default.
        """
        from megatron_ral.models.packed_attention import register

        tower_class: Any = self.tower_class()
        return tower_class._from_config(copy.deepcopy(vision), dtype=dtype, attn_implementation=register())

    def tower_inputs(self, tower: "torch.nn.Module", grids: "torch.Tensor") -> TowerInputs:
        """Return the inputs of a tower that follow from the sizes of pictures and videos.

        Args:
            tower: tower from `build_tower`.
            grids: patches along time, height and width, [V, 3] int64 in host memory.
        """
        from transformers.vision_utils import get_vision_position_ids

        positions = get_vision_position_ids(grids, cast(int, tower.spatial_merge_size))
        frames = [height * width for time, height, width in grids.tolist() for _ in range(time)]
        return TowerInputs({"position_ids": positions}, {"frames": frames})

    def counted_size(
        self, num_frames: int, height: int, width: int, *, temporal_patch_size: int, token_side: int
    ) -> tuple[int, int, int]:
        """Return (frames, height, width) of a clip for the limits of its pixels, before it is resized.

        Args:
            num_frames: sampled frames, at least 1.
            height: pixels of an upright frame.
            width: pixels of an upright frame.
            temporal_patch_size: frames per temporal patch.
            token_side: pixels per visual token and side.
        """
        return max(num_frames, temporal_patch_size), height, width

    def video_placeholder(self, tokens: VisionTokens) -> str:
        """Return the part of the chat template's text that the tokens of a video replace."""
        return tokens.video

    def video_text(self, tokens: VisionTokens, run_lengths: Sequence[int], stamps: Sequence[float]) -> str:
        """Return the text of a video in the prompt, one placeholder per visual token.

        Args:
            run_lengths: visual tokens of each run.
            stamps: seconds of each temporal patch after the clip's first frame.
        """
        return tokens.video * sum(run_lengths)

    def temporal_interval(self, vision: "PretrainedConfig", seconds: float) -> float:
        """Return the rotary positions from one temporal patch of a video to the next.

        Args:
            vision: `vision_config` of the checkpoint.
            seconds: duration of one temporal patch.
        """
        return 1.0

    def stock_video_inputs(self, seconds_per_grid: "torch.Tensor") -> dict[str, Any]:
        """Return the inputs that transformers' model takes for videos, beside pixels and grids.

        Args:
            seconds_per_grid: [videos] float32 seconds of one temporal patch.
        """
        return {}
