"""InternVL3.5 in the Hugging Face format (`internvl`, arXiv 2508.18265): Qwen3 as language model with positions of one
axis; a picture is cut into tiles of one size, beside a small copy of the whole, and every tile is as many visual tokens
(256 at the published size). Frames of a video are one tile each.

What stock transformers does with a tile, pixel shuffle and projector included, is done by its own modules
(`_tower`). Tiles are kept as patches in the order of visual tokens, as the pixels of every family are.
"""

import copy
import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Iterator, Mapping, Optional, Sequence, cast

from megatron_ral.models.families.base import Family, PatchRules, PictureView, TowerInputs, VisionTokens

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PretrainedConfig

    from megatron_ral.types import Prompt

_PROJECTOR = ("downsample_ratio", "projector_hidden_act", "image_seq_length")
"""Settings of the projector in config.json, which stand beside `vision_config`."""
_CROP = {"crop_to_patches": True}
"""Option with which InternVLProcessor calls its image processor, whatever preprocessor_config.json says."""


class InternVL(Family):
    """Rules of InternVL3.5."""

    # --- sizes and ids ------------------------------------------------------------------------------------------------

    def vision_config(self, config: "PretrainedConfig") -> "PretrainedConfig":
        """Return `vision_config` with the settings of the projector, among them the width of its result."""
        vision = copy.deepcopy(config.vision_config)
        for name in _PROJECTOR:
            setattr(vision, name, getattr(config, name))
        vision.out_hidden_size = config.text_config.hidden_size
        return vision

    def patch_rules(self, vision: "PretrainedConfig") -> PatchRules:
        """Return sizes with a fixed frame, the tile."""
        of: Any = vision
        patch, merge = of.patch_size[0], round(1 / of.downsample_ratio)
        return PatchRules(patch, 1, merge, of.num_channels, tuple(side // patch for side in of.image_size))

    def token_ids(self, config: "PretrainedConfig") -> tuple[int, int, tuple[int, ...]]:
        """Return one token for images and videos. config.json names no tokens around visual input."""
        return config.image_token_id, config.image_token_id, (config.image_token_id,)

    def named_token_ids(self, config: "PretrainedConfig", tokenizer: Any) -> Mapping[str, Optional[int]]:
        """Return the ids of the image token, and of those that the tokenizer names for videos and around tiles."""
        names = ("video_token", "start_image_token", "end_image_token")
        texts = {name: getattr(tokenizer, name, None) for name in names}
        return {
            "image_token_id": config.image_token_id,
            **{name: text and tokenizer.convert_tokens_to_ids(text) for name, text in texts.items()},
        }

    def rotary_sections(self, text: "PretrainedConfig") -> tuple[int, ...]:
        """Return all frequencies for one axis, because image tokens have positions like text."""
        return (text.head_dim // 2,)

    def fixed_values(self, config: "PretrainedConfig") -> Iterator[tuple[str, Any, Any]]:
        """Yield the rules of every family, and those of this one's language model, tower and projector."""
        yield "text_config.model_type", config.text_config.model_type, "qwen3"
        yield from super().fixed_values(config)
        vision, patch = config.vision_config, config.vision_config.patch_size
        for name in ("hidden_dropout_prob", "attention_dropout", "projection_dropout"):
            yield f"vision_config.{name}", float(getattr(vision, name)), 0.0
        yield "vision_config.use_mask_token", vision.use_mask_token, False
        yield "vision_config.patch_size", list(patch), [patch[0]] * 2
        yield "vision_config.image_size", list(vision.image_size), [vision.image_size[0]] * 2
        yield "vision_feature_layer", config.vision_feature_layer, -1
        yield "vision_feature_select_strategy", config.vision_feature_select_strategy, "default"
        rules = self.patch_rules(self.vision_config(config))
        yield "image_seq_length", config.image_seq_length, rules.frame_tokens

    # --- the vision tower ---------------------------------------------------------------------------------------------

    def tower_class(self) -> type:
        """Return the class of the tower without its projector in transformers."""
        from transformers.models.internvl.modeling_internvl import InternVLVisionModel

        return InternVLVisionModel

    def build_tower(self, vision: "PretrainedConfig", dtype: Optional["torch.dtype"] = None) -> "torch.nn.Module":
        """Build tower and projector in one module, with the names that they have in transformers' model."""
        return _tower(super().build_tower(vision, dtype), vision, self.patch_rules(vision)).to(dtype)

    def tower_inputs(self, tower: "torch.nn.Module", grids: "torch.Tensor") -> TowerInputs:
        """Return nothing: all tiles have one size, whose positions are learned."""
        return TowerInputs({}, {})

    def blank_frame(self, tower: "torch.nn.Module") -> tuple[int, int]:
        """Return the patches of a tile."""
        height, width = cast(Any, tower).rules.frame
        return height, width

    def head_width(self, tower: "torch.nn.Module") -> int:
        """Return the width of one attention head."""
        config: Any = tower.config
        return config.hidden_size // config.num_attention_heads

    def products_per_patch(self, name: str, size: Sequence[int], merge_size: int) -> float:
        """Return 0 for learned positions and tokens, and a share for the projector."""
        if len(size) < 2 or name.endswith(("position_embeddings", "cls_token")):
            return 0.0
        return 1 / merge_size**2 if name.startswith("multi_modal_projector") else 1.0

    # --- pictures and videos ------------------------------------------------------------------------------------------

    def image_processor_class(self) -> Any:
        """Return the class of the image processor in transformers."""
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        return GotOcr2ImageProcessorPil

    def image_processor_sizes(self, vision: "PretrainedConfig") -> Mapping[str, Any]:
        """Return the size of a tile."""
        height, width = cast(Any, vision).image_size
        return {"size": {"height": height, "width": width}}

    def image_size_rules(self, processor: Any) -> list[Any]:
        """Return the size of a tile and the limits of their number."""
        names = ("min_patches", "max_patches")
        return [{name: getattr(processor, name) for name in names}, dict(processor.size)]

    def image_grid(self, width: int, height: int, processor: Any, rules: PatchRules) -> "torch.Tensor":
        """Return the tiles of a picture, the small copy among them, as frames: [3] int64 patches."""
        import torch

        return torch.tensor([processor.get_number_of_image_patches(height, width, _CROP), *rules.frame])

    def patchify_image(
        self, image: "Image", processor: Any, rules: PatchRules
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return the patches of the tiles that the stock image processor makes, as InternVLProcessor calls it."""
        import numpy as np
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        from megatron_ral.functional.patches import cut_frames, resize

        high, wide = processor.size["height"], processor.size["width"]
        limits = processor.min_patches, processor.max_patches
        wide_tiles, high_tiles = get_optimal_tiled_canvas((image.height, image.width), (high, wide), *limits)
        canvas = resize(image, wide_tiles * wide, high_tiles * high, processor.resample)
        corners = [(column * wide, row * high) for row in range(high_tiles) for column in range(wide_tiles)]
        tiles = [canvas.crop((x, y, x + wide, y + high)) for x, y in corners]
        if len(tiles) > 1:
            tiles.append(resize(image, wide, high, processor.resample))
        frames = np.stack([np.asarray(tile) for tile in tiles])
        return cut_frames(frames, 1, rules.patch_size, rules.merge_size), self.image_grid(*image.size, processor, rules)

    def picture_views(self, grid: Sequence[int], token_side: int, width: int, height: int) -> list[PictureView]:
        """Return the picture, joined from its tiles, and the small copy where there is more than one tile.

        The arrangement of so many tiles follows from the size of the picture, by the rule of the image processor.
        """
        import torch
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        frames, rows, columns = grid
        cells = torch.arange(math.prod(grid)).view(frames, rows, columns)
        if frames == 1:
            return [PictureView("", cells[0])]
        tile = rows * token_side, columns * token_side
        wide, high = get_optimal_tiled_canvas((height, width), tile, frames - 1, frames - 1)
        whole = cells[:-1].view(high, wide, rows, columns).transpose(1, 2).reshape(high * rows, wide * columns)
        return [PictureView("", whole), PictureView("small copy", cells[-1])]

    def image_text(self, tokens: VisionTokens, length: int) -> str:
        """Return all tiles of an image as one run between the tokens around it."""
        return tokens.start + tokens.image * length + tokens.end

    def video_text(self, tokens: VisionTokens, run_lengths: Sequence[int], stamps: Sequence[float]) -> str:
        """Return one numbered line per frame; the number stands in place of a time."""
        return "\n".join(
            f"Frame{number + 1}: {tokens.start}{tokens.image * length}{tokens.end}"
            for number, length in enumerate(run_lengths)
        )

    # --- positions, and stock transformers ----------------------------------------------------------------------------

    def positions(
        self, is_visual: "torch.Tensor", grids: "torch.Tensor", merge_size: int, intervals: Sequence[float]
    ) -> tuple["torch.Tensor", int]:
        """Return the places of the tokens, equal on all three axes."""
        import torch

        return torch.arange(len(is_visual)).repeat(3, 1), len(is_visual)

    def stock_inputs(self, prompt: "Prompt", input_ids: "torch.Tensor", config: "PretrainedConfig") -> dict[str, Any]:
        """Return the tokens, and the tiles of all images and videos in their order."""
        rules, result = self.patch_rules(self.vision_config(config)), {"input_ids": input_ids[None]}
        return {**result, "pixel_values": _tiles(prompt.pixel_values, rules)} if len(prompt.grid_thw) else result


def _tiles(patches: "torch.Tensor", rules: PatchRules) -> "torch.Tensor":
    """Return tiles [tiles, channels, height, width] of their patches."""
    from megatron_ral.functional.patches import join_frames

    height, width = rules.frame
    return join_frames(patches, (height, width), rules.temporal_patch_size, rules.patch_size, rules.merge_size)


def _tower(model: "torch.nn.Module", vision: "PretrainedConfig", rules: PatchRules) -> "torch.nn.Module":
    """Return transformers' tower and projector as one module that reads patches as the towers of other families do."""
    import torch
    from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

    of: Any = vision
    stock = SimpleNamespace(
        vision_config=vision,
        text_config=SimpleNamespace(hidden_size=of.out_hidden_size),
        downsample_ratio=of.downsample_ratio,
        projector_hidden_act=of.projector_hidden_act,
    )

    class Tower(torch.nn.Module):
        """Tower and projector: patches of tiles -> visual tokens."""

        def __init__(self):
            super().__init__()
            self.config, self.rules, self.spatial_merge_size = vision, rules, rules.merge_size
            self.vision_tower, self.multi_modal_projector = model, InternVLMultiModalProjector(cast(Any, stock))

        def forward(self, patches: torch.Tensor, **unused: Any) -> SimpleNamespace:
            """Return `pooler_output` [visual tokens, hidden] for patches [tiles * patches of a tile, numbers]."""
            features = self.vision_tower(pixel_values=_tiles(patches, rules)).last_hidden_state[:, 1:]
            features = features.unflatten(1, rules.frame)
            shuffled = InternVLModel.pixel_shuffle(cast(Any, None), features, scale_factor=of.downsample_ratio)
            return SimpleNamespace(pooler_output=self.multi_modal_projector(shuffled.flatten(0, 2)))

    return Tower()


INTERNVL = InternVL(
    "internvl",
    qkv_bias=False,
    qk_norm=True,
    interleaved_rotary=False,
    hub_prefixes=(("model.", "language_model.model."), ("visual.", ""), ("lm_head.", "language_model.lm_head.")),
    spellings=(
        ("language_model.model.", "model."),
        ("model.language_model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        *(
            (f"{prefix}{part}.", f"visual.{part}.")
            for prefix in ("", "model.")
            for part in ("vision_tower", "multi_modal_projector")
        ),
    ),
    timed_video=True,
    template_has_pair=False,
    image_processors="GotOcr2",
)
