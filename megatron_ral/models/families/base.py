"""The interface of a model family: all that differs between the families that this project trains.

A family has one file beside this one and one line in the registry (`__init__.py`). Everything here is pure and cheap to
import: torch and transformers are imported inside methods. The defaults are the rules of Qwen2.5-VL, so that another
family states only where it departs from them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional, Sequence

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
        """Build the vision tower of a checkpoint: Hugging Face's own module with random weights.

        A call `tower(pixels, grid_thw=grids)` returns `pooler_output` [visual tokens, hidden] and, in families with
        DeepStack, `deepstack_features`, a list of tensors of the same shape.

        Args:
            vision: `vision_config` of the checkpoint.
            dtype: precision of the parameters; None: torch's default.
        """
        return self.tower_class()._from_config(vision, dtype=dtype)

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
