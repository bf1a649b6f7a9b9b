"""The interface of a model family: all that differs between the families that this project trains.

A family has one file beside this one and one line in the registry (`__init__.py`). Everything here is pure and cheap to
import: torch and transformers are imported inside methods. The defaults are the rules of Qwen2.5-VL, so that another
family states only where it departs from them.
"""

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Iterator, Mapping, Optional, Sequence, cast

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PretrainedConfig

    from megatron_ral.models.linear_attention import LinearAttentionShape
    from megatron_ral.types import Prompt


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
class PatchRules:
    """Sizes by which pixels become patches, and patches become visual tokens."""

    patch_size: int
    """Pixels along a side of a patch."""
    temporal_patch_size: int
    """Frames of one patch."""
    merge_size: int
    """Patches along a side of one visual token."""
    channels: int = 3
    """Channels of a picture."""
    frame: tuple[int, ...] = ()
    """Patches of every frame along height and width; empty where pictures keep their own size."""

    @property
    def width(self) -> int:
        """Numbers of one patch."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def token_side(self) -> int:
        """Pixels along a side of one visual token."""
        return self.patch_size * self.merge_size

    @property
    def frame_tokens(self) -> int:
        """Visual tokens of every frame, 1 where pictures keep their own size."""
        return math.prod(self.frame) // self.merge_size**2 if self.frame else 1


@dataclass(frozen=True)
class PictureView:
    """One view of a picture among its visual tokens: the whole picture, or a small copy of it."""

    name: str
    """Name of the view, empty for the picture itself."""
    tokens: "torch.Tensor"
    """[rows, columns] int64 index, among the visual tokens of the picture, of the token that shows each cell."""


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
    output_gate: bool = False
    """Presence of a gate on the outputs of softmax attention, from the same projection as the queries."""
    zero_centred_norms: bool = False
    """Factor of the norms: 1 + weight (True), or weight. Norms of linear attention have the weight in any case."""
    unused_weights: tuple[str, ...] = ()
    """Beginnings of the names of stored weights that are no part of the model, as stock transformers leaves them out.
    """
    hub_prefixes: tuple[tuple[str, str], ...] = ()
    """Pairs (our prefix, prefix on the hub) of weight names."""
    spellings: tuple[tuple[str, str], ...] = (("model.language_model.", "model."), ("model.visual.", "visual."))
    """Pairs (prefix that transformers or the hub have used, our prefix) of weight names."""
    end_of_turn: str = "<|im_end|>"
    """Token that ends a response."""
    timed_video: bool = False
    """Form of a video in the prompt: one run of visual tokens per temporal patch, each behind a time or number in text
    (True), or a single run for the whole video (False)."""
    template_has_pair: bool = True
    """Presence of the tokens around visual input in the chat template's text; False: they come with the visual tokens.
    """
    vllm_issue: str = "its responses there were never compared with ours"
    """Reason for which vLLM must not sample for the family; empty: it may."""
    image_processors: str = "Qwen"
    """Beginning of the names of image processors in preprocessor_config.json that make this family's patches."""

    # --- sizes and ids ------------------------------------------------------------------------------------------------

    def vision_config(self, config: "PretrainedConfig") -> "PretrainedConfig":
        """Return the part of a checkpoint's configuration that describes the vision tower and its projector."""
        return config.vision_config

    def patch_rules(self, vision: "PretrainedConfig") -> PatchRules:
        """Return the sizes of patches, given the checkpoint's `vision_config`."""
        return PatchRules(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size, vision.in_channels)

    def token_ids(self, config: "PretrainedConfig") -> tuple[int, int, tuple[int, ...]]:
        """Return the tokens of an image and of a video, and all that stand for visual input or around it."""
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
        found = {value for name in names if (value := getattr(config, name, None)) is not None}
        return config.image_token_id, config.video_token_id, tuple(sorted(found))

    def named_token_ids(self, config: "PretrainedConfig", tokenizer: Any) -> Mapping[str, Optional[int]]:
        """Return the ids of the four texts of `VisionTokens`, in their order, by the names that a folder has for them.

        None stands for an id that the folder does not name.
        """
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        return {name: getattr(config, name, None) for name in names}

    def rotary_sections(self, text: "PretrainedConfig") -> tuple[int, ...]:
        """Return the number of rotary frequencies of each axis (time, height, width), given `text_config`."""
        return tuple(text.rope_parameters.get("mrope_section") or ())

    def linear_attention(self, text: "PretrainedConfig") -> "Optional[LinearAttentionShape]":
        """Return the sizes of the layers with linear attention, given `text_config`; None: the family has none."""
        return None

    def fixed_values(self, config: "PretrainedConfig") -> Iterator[tuple[str, Any, Any]]:
        """Yield (name in config.json, its value, the only value that is known)."""
        text = config.text_config
        layers = sorted(set(getattr(text, "layer_types", None) or ["full_attention"]))
        yield "text_config.hidden_act", text.hidden_act, "silu"
        yield "text_config.attention_dropout", text.attention_dropout, 0.0
        yield "text_config.attention_bias", getattr(text, "attention_bias", False), False
        yield "text_config.layer_types", layers, ["full_attention"]
        yield "text_config.rope_parameters.rope_type", text.rope_parameters.get("rope_type", "default"), "default"
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        sections = sum(self.rotary_sections(text))
        yield "text_config.rope_parameters.mrope_section, summed", sections, width // 2

    # --- weights and the vision tower ---------------------------------------------------------------------------------

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
        from megatron_ral.models.patch_projection import project_patches

        tower_class: Any = self.tower_class()
        tower = tower_class._from_config(copy.deepcopy(vision), dtype=dtype, attn_implementation=register())
        project_patches(tower)
        return tower

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

    def blank_frame(self, tower: "torch.nn.Module") -> tuple[int, int]:
        """Return the patches along height and width of the smallest frame that a tower reads."""
        merge = cast(int, tower.spatial_merge_size)
        return merge, merge

    def head_width(self, tower: "torch.nn.Module") -> int:
        """Return the width of one attention head of a tower."""
        config: Any = tower.config
        return config.hidden_size // config.num_heads

    def products_per_patch(self, name: str, size: Sequence[int], merge_size: int) -> float:
        """Return how often a pass multiplies a patch with the weights of one parameter of the tower.

        Args:
            name: name of the parameter inside the tower.
            size: its shape.
            merge_size: patches along a side of one visual token.
        """
        if len(size) < 2 or name.startswith("pos_embed"):
            return 0.0
        return 1 / merge_size**2 if "merger" in name else 1.0

    # --- pictures -----------------------------------------------------------------------------------------------------

    def image_processor_class(self) -> Any:
        """Return the class of the image processor in transformers."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        return Qwen2VLImageProcessorPil

    def image_processor_sizes(self, vision: "PretrainedConfig") -> Mapping[str, Any]:
        """Return the settings of the image processor that follow from `vision_config`."""
        rules = self.patch_rules(vision)
        return {name: getattr(rules, name) for name in ("patch_size", "temporal_patch_size", "merge_size")}

    def image_size_rules(self, processor: Any) -> list[Any]:
        """Return the settings of an image processor that decide the number of visual tokens, as JSON values."""
        names = ("do_resize", "patch_size", "temporal_patch_size", "merge_size")
        size = {name: processor.size[name] for name in ("shortest_edge", "longest_edge")}
        return [{name: getattr(processor, name, None) for name in names}, size]

    def image_grid(self, width: int, height: int, processor: Any, rules: PatchRules) -> "torch.Tensor":
        """Return the patches (t, h, w) of a picture of so many pixels, [3] int64.

        Raises:
            ValueError: a shape that the image processor refuses.
        """
        from megatron_ral.functional.patches import image_grid

        return image_grid(width, height, processor)

    def patchify_image(
        self, image: "Image", processor: Any, rules: PatchRules
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return the patches of an RGB picture and `image_grid` of its size.

        Patches are [t h w, 1, patch * patch, channels] uint8 (see `types.Patches`). Those of one visual token are
        neighbours, tokens go row by row, and frame follows frame.
        """
        from megatron_ral.functional.patches import patchify_image

        return patchify_image(image, processor)

    def picture_views(self, grid: Sequence[int], token_side: int, width: int, height: int) -> list[PictureView]:
        """Return the views of a picture that its visual tokens hold.

        Args:
            grid: visual tokens of the picture along t, height and width.
            token_side: pixels along a side of one visual token.
            width: pixels of the picture.
            height: pixels of the picture.
        """
        import torch

        return [PictureView("", torch.arange(math.prod(grid)).view(*grid[1:]))]

    def image_text(self, tokens: VisionTokens, length: int) -> str:
        """Return the text of an image in the prompt, one placeholder per visual token.

        Args:
            length: visual tokens of the image.
        """
        return tokens.image * length

    # --- videos -------------------------------------------------------------------------------------------------------

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

    # --- positions, and stock transformers ----------------------------------------------------------------------------

    def positions(
        self, is_visual: "torch.Tensor", grids: "torch.Tensor", merge_size: int, intervals: Sequence[float]
    ) -> tuple["torch.Tensor", int]:
        """Return the rotary positions of a prompt, [3, P] int64, and the position of the next text token.

        Arguments are those of `functional.positions.multimodal_positions`.
        """
        from megatron_ral.functional.positions import multimodal_positions

        return multimodal_positions(is_visual, grids, merge_size, intervals)

    def stock_inputs(self, prompt: "Prompt", input_ids: "torch.Tensor", config: "PretrainedConfig") -> dict[str, Any]:
        """Return the inputs that transformers' own model takes for one sequence.

        Args:
            prompt: prompt that the sequence begins with.
            input_ids: [L] int64 tokens of the whole sequence.
            config: configuration of the checkpoint.
        """
        import torch

        patches = prompt.pixel_values.split(prompt.grid_thw.prod(dim=1).tolist())
        video = prompt.is_video
        types = (input_ids == config.image_token_id).int() + 2 * (input_ids == config.video_token_id).int()
        result: dict[str, Any] = {"input_ids": input_ids[None], "mm_token_type_ids": types[None]}
        if not video.all():
            result["pixel_values"] = torch.cat([part for part, is_video in zip(patches, video) if not is_video])
            result["image_grid_thw"] = prompt.grid_thw[~video]
        if video.any():
            result["pixel_values_videos"] = torch.cat([part for part, is_video in zip(patches, video) if is_video])
            result["video_grid_thw"] = prompt.grid_thw[video]
            result |= self.stock_video_inputs(prompt.seconds_per_grid[video])
        return result

    def stock_video_inputs(self, seconds_per_grid: "torch.Tensor") -> dict[str, Any]:
        """Return the inputs that transformers' model takes for videos, beside pixels and grids.

        Args:
            seconds_per_grid: [videos] float32 seconds of one temporal patch.
        """
        return {}
