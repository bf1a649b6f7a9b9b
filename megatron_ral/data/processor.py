"""Sample -> Prompt: chat template, visual tokens, rotary positions, target cells.

The image processor is Hugging Face's Qwen2-VL one in its PIL backend (no torchvision), the tokenizer whatever the
checkpoint folder holds. Visual tokens are counted here, before any truncation could be thought of, so that a mismatch is
found where the sample's key is known.
"""

import io
import json
from typing import Any, Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megatron_ral.config import ConfigError
from megatron_ral.data.targets import TargetError, clip_cells, image_cells
from megatron_ral.data.video import (
    PICTURE_FORMATS, VideoError, VideoSettings, grid_timestamps, patchify_video, read_clip, seconds_per_grid)
from megatron_ral.functional.positions import multimodal_positions
from megatron_ral.types import Prompt, Sample

END_OF_TURN = "<|im_end|>"


class SampleError(ValueError):
    """A sample that cannot be used; the loader quarantines it under its key and goes on."""


class _Visual:
    """One image or video of a sample: its patches and how its tokens stand in the text.

    Args:
        pixels: [patches, width] float32.
        grid: [3] int64.
        seconds: of one temporal patch of a video; None: an image.
        stamps: time stamps of the temporal patches where each is a run of its own; None: one run.
        targets: [tokens] bool, tokens that show what is asked for; None: none does.
    """

    def __init__(self, pixels: Tensor, grid: Tensor, seconds: float | None = None, stamps: list[float] | None = None,
                 targets: Tensor | None = None):
        self.pixels, self.grid, self.seconds, self.stamps, self.targets = pixels, grid, seconds, stamps, targets
        self.is_video = seconds is not None

    def runs(self) -> Tensor:
        """Grid of each run of visual tokens, [runs, 3]."""
        return self.grid[None] if self.stamps is None else self.grid.new_tensor([[1, *self.grid[1:]]] * len(self.stamps))


class PromptProcessor:
    """Turns samples into prompts for one checkpoint folder.

    Args:
        path: Hugging Face folder with config, tokenizer and image processor.
        max_prompt_length: tokens, visual tokens included; a longer prompt raises SampleError.
        include_process: whether the reference response has the reasoning before the answer.

    Raises:
        ConfigError: no usable tokenizer or image processor in the folder.
    """

    def __init__(self, path: str, max_prompt_length: int, include_process: bool = True):
        try:
            config = AutoConfig.from_pretrained(path)
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"'{path}' holds no usable tokenizer and image processor "
                              f"({' '.join(str(error).split())[:200]})") from None
        self.max_prompt_length, self.include_process = max_prompt_length, include_process
        self.image_token_id, self.video_token_id = config.image_token_id, config.video_token_id
        names = (self.image_token_id, self.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
        self.image_token, self.video_token, self.vision_start, self.vision_end = \
            self.tokenizer.convert_ids_to_tokens(names)
        vision = config.vision_config
        self.merge_size = vision.spatial_merge_size
        self.pixel_width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        self.timed_frames = config.model_type == "qwen3_vl"
        self.tokens_per_second = getattr(vision, "tokens_per_second", 1)
        self.video = VideoSettings.from_image_processor(self.image_processor, family=config.model_type)
        self.end_token_id = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        self.pad_token_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        if self.end_token_id is None or self.end_token_id == self.tokenizer.unk_token_id:
            raise ConfigError(f"the tokenizer in '{path}' has no {END_OF_TURN} token")

    def __call__(self, sample: Sample) -> Prompt:
        """Raises SampleError naming the key when an image or video cannot be decoded, does not match its tokens, the
        prompt is too long, or a box or span lies outside the image or video."""
        self._refuse_control_tokens(sample)
        images = [self._decode(sample, data) for data in sample.images]
        visuals = [*self._image_visuals(sample, images),
                   *(self._video_visual(sample, number) for number in range(len(sample.videos)))]
        input_ids = torch.tensor(self._tokenize(sample, visuals))
        visual_mask = (input_ids == self.image_token_id) | (input_ids == self.video_token_id)
        num_features = sum(len(visual.pixels) for visual in visuals) // self.merge_size**2
        if int(visual_mask.sum()) != num_features:
            raise SampleError(f"sample '{sample.key}': {int(visual_mask.sum())} visual tokens in the text but "
                              f"{num_features} visual features")
        if len(input_ids) > self.max_prompt_length:
            raise SampleError(f"sample '{sample.key}': prompt of {len(input_ids)} tokens is longer than "
                              f"data.max_prompt_length = {self.max_prompt_length}")
        runs = [visual.runs() for visual in visuals]
        intervals = [self._temporal_interval(visual) for visual, grids in zip(visuals, runs) for _ in grids]
        position_ids, next_position = multimodal_positions(
            visual_mask, torch.cat(runs) if runs else torch.zeros(0, 3, dtype=torch.int64), self.merge_size, intervals)
        grids = [visual.grid for visual in visuals]
        reference = (sample.process if self.include_process else "") + sample.solution
        response = self.tokenizer(reference, add_special_tokens=False)["input_ids"]
        return Prompt(
            sample=sample, input_ids=input_ids, position_ids=position_ids, next_position=next_position,
            pixel_values=torch.cat([torch.zeros(0, self.pixel_width), *(visual.pixels for visual in visuals)]),
            grid_thw=torch.stack(grids) if grids else torch.zeros(0, 3, dtype=torch.int64),
            is_video=torch.tensor([visual.is_video for visual in visuals], dtype=torch.bool),
            seconds_per_grid=torch.tensor([visual.seconds or 0.0 for visual in visuals]),
            visual_mask=visual_mask, target_mask=self._target_mask(sample, visuals, visual_mask),
            response_ids=torch.tensor(response + [self.end_token_id]),
        )

    def check_same(self, other: "PromptProcessor", key: str, other_key: str) -> None:
        """Raise ConfigError naming the first difference where `other` would read a sample otherwise.

        Compared: the tokens and their ids, how text is cut into them, and how a picture becomes patches. Not compared: the
        chat template and the limits of a picture's size, because prompts are made by this processor alone.
        """
        ours, theirs = (self._token_rules(), other._token_rules())
        vocabularies = [processor.tokenizer.get_vocab() for processor in (self, other)]
        for token in sorted(set(vocabularies[0]) | set(vocabularies[1])):
            ids = [vocabulary.get(token) for vocabulary in vocabularies]
            if ids[0] != ids[1]:
                names = ["no id" if number is None else f"id {number}" for number in ids]
                raise ConfigError(f"{other_key} has another tokenizer than {key}: token {token!r} has {names[1]} in "
                                  f"{other_key} and {names[0]} in {key}; distil from a model with the same tokenizer")
        for name, mine in ours.items():
            if mine != theirs[name]:
                raise ConfigError(f"{other_key} has another tokenizer than {key}: {name} is {str(theirs[name])[:120]} in "
                                  f"{other_key} and {str(mine)[:120]} in {key}")
        for name in ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "rescale_factor"):
            values = [getattr(processor.image_processor, name, None) for processor in (other, self)]
            if values[0] != values[1]:
                raise ConfigError(f"{other_key} makes other patches of a picture than {key}: {name} is {values[0]} in "
                                  f"{other_key} and {values[1]} in {key}; distil from a model with the same visual grid")

    def _token_rules(self) -> dict[str, Any]:
        """How the tokenizer cuts text, beside its vocabulary."""
        rules = json.loads(self.tokenizer.backend_tokenizer.to_str())
        model = rules["model"]
        return {"merges": model.get("merges"), "type": model.get("type"), "normalizer": rules.get("normalizer"),
                "pre_tokenizer": rules.get("pre_tokenizer")}

    def stock_inputs(self, prompt: Prompt, input_ids: Tensor) -> dict[str, Any]:
        """What stock transformers takes for one sequence that begins with `prompt`, for comparisons with it.

        Args:
            input_ids: [L] int64, the prompt's tokens and whatever follows.
        """
        patches = prompt.pixel_values.split(prompt.grid_thw.prod(dim=1).tolist())
        video = prompt.is_video
        types = (input_ids == self.image_token_id).int() + 2 * (input_ids == self.video_token_id).int()
        result: dict[str, Any] = {"input_ids": input_ids[None], "mm_token_type_ids": types[None]}
        if not video.all():
            result["pixel_values"] = torch.cat([part for part, is_video in zip(patches, video) if not is_video])
            result["image_grid_thw"] = prompt.grid_thw[~video]
        if video.any():
            result["pixel_values_videos"] = torch.cat([part for part, is_video in zip(patches, video) if is_video])
            result["video_grid_thw"] = prompt.grid_thw[video]
            if not self.timed_frames:
                result["second_per_grid_ts"] = prompt.seconds_per_grid[video]
        return result

    def decode(self, token_ids: Tensor) -> str:
        """Text of a response, special tokens removed."""
        return self.tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)

    def _decode(self, sample: Sample, data: bytes) -> Image.Image:
        try:
            return Image.open(io.BytesIO(data), formats=PICTURE_FORMATS).convert("RGB")
        except Exception as error:  # PIL raises many types; each of them means this one picture is unusable
            raise SampleError(f"sample '{sample.key}': image cannot be decoded ({error})") from None

    def _refuse_control_tokens(self, sample: Sample) -> None:
        """Text that holds a special token of the checkpoint would end a turn or ask for visual features."""
        for field in ("problem", "process", "solution"):
            for token in self.tokenizer.all_special_tokens:
                if token in getattr(sample, field):
                    raise SampleError(f"sample '{sample.key}': its {field} contains the special token {token}, which is "
                                      "not text to this model; remove it")

    def _image_visuals(self, sample: Sample, images: list[Image.Image]) -> list[_Visual]:
        if not images:
            if sample.target_boxes:
                raise SampleError(f"sample '{sample.key}' has target_boxes but no image they could lie in (a video has "
                                  "target_frames)")
            return []
        try:
            features = self.image_processor(images=images, return_tensors="pt")
        except ValueError as error:  # an aspect ratio that the processor refuses
            raise SampleError(f"sample '{sample.key}': image cannot be used ({error})") from None
        grids = features["image_grid_thw"]
        try:
            targets = image_cells(sample.target_boxes, *images[0].size, *self._token_grid(grids[0])[1:]).flatten()
        except TargetError as error:
            raise SampleError(f"sample '{sample.key}': {error}") from None
        patches = features["pixel_values"].split(grids.prod(dim=1).tolist())
        return [_Visual(pixels, grid, targets=None if number else targets)
                for number, (pixels, grid) in enumerate(zip(patches, grids))]

    def _video_visual(self, sample: Sample, number: int) -> _Visual:
        video, targets = sample.videos[number], None
        try:
            decoded = read_clip(video, self.video)
            pixels, grid = patchify_video(decoded, self.video)
            if number == 0 and sample.target_frames:
                targets = clip_cells(sample.target_frames, decoded, self._token_grid(grid),
                                     self.video.temporal_patch_size).flatten()
        except (VideoError, TargetError) as error:
            raise SampleError(f"sample '{sample.key}': {error}") from None
        stamps = grid_timestamps(decoded, self.video) if self.timed_frames else None
        return _Visual(pixels, grid, seconds_per_grid(decoded, self.video), stamps, targets)

    def _token_grid(self, grid: Tensor) -> tuple[int, int, int]:
        """Patches (t, h, w) -> visual tokens (t, rows, columns)."""
        t, h, w = grid.tolist()
        return t, h // self.merge_size, w // self.merge_size

    def _temporal_interval(self, visual: _Visual) -> float:
        """Rotary positions from one temporal patch to the next, in float32 as stock transformers has them."""
        one_run_of_frames = visual.is_video and visual.stamps is None
        return float(self.tokens_per_second * torch.tensor(visual.seconds)) if one_run_of_frames else 1.0

    def _tokenize(self, sample: Sample, visuals: Sequence[_Visual]) -> list[int]:
        content = [{"type": "video" if visual.is_video else "image"} for visual in visuals]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": sample.problem}]}], tokenize=False,
            add_generation_prompt=True)
        expanded = ""
        for number, visual in enumerate(visuals):
            place = self.video_token if visual.is_video else self.image_token
            if visual.stamps is not None:
                place = self.vision_start + place + self.vision_end
            before, found, text = text.partition(place)
            if not found or self.image_token in before or self.video_token in before:
                raise SampleError(f"sample '{sample.key}': the chat template of this checkpoint has no {place} for "
                                  f"image or video {number}")
            expanded += before + self._visual_text(visual)
        return self.tokenizer(expanded + text, add_special_tokens=False)["input_ids"]

    def _visual_text(self, visual: _Visual) -> str:
        """Tokens that stand for one image or video.

        With time stamps they replace the template's whole <|vision_start|><|video_pad|><|vision_end|>, as Qwen3-VL's
        processor did in transformers 4.57; version 5 replaces the middle alone and keeps an outer pair of tokens.
        """
        counts = (visual.runs().prod(dim=1) // self.merge_size**2).tolist()
        if visual.stamps is None:
            return (self.video_token if visual.is_video else self.image_token) * counts[0]
        return "".join(f"<{stamp:.1f} seconds>{self.vision_start}{self.video_token * count}{self.vision_end}"
                       for stamp, count in zip(visual.stamps, counts))

    def _target_mask(self, sample: Sample, visuals: Sequence[_Visual], visual_mask: Tensor) -> Tensor:
        """[P] bool: annotated visual tokens of the first image and of the first video."""
        if sample.target_frames and not sample.videos:
            raise SampleError(f"sample '{sample.key}' has target_frames but no video they could lie in (an image has "
                              "target_boxes)")
        mask = torch.zeros_like(visual_mask)
        mask[visual_mask] = torch.cat([torch.zeros(0, dtype=torch.bool), *(
            visual.targets if visual.targets is not None else torch.zeros(len(visual.pixels) // self.merge_size**2,
                                                                          dtype=torch.bool) for visual in visuals)])
        return mask
