"""Sample -> Prompt: chat template, visual tokens, rotary positions, target cells.

The image processor's settings are those of Hugging Face's Qwen2-VL one (`pictures.py` does its work), the tokenizer is
whatever the checkpoint folder holds. Visual tokens are counted here, before any truncation could be thought of, so that
a mismatch is found where the sample's key is known.
"""

import json
import threading
from dataclasses import asdict
from hashlib import blake2b
from typing import Any, Optional, Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megatron_ral.errors import ConfigError
from megatron_ral.data.issues import SampleError
from megatron_ral.data.index import SampleLengths
from megatron_ral.data.pictures import MAX_IMAGE_PIXELS, image_grid, open_image, patchify_image
from megatron_ral.data.targets import TargetError, clip_cells, image_cells
from megatron_ral.data.video import (
    MAX_SIDE,
    DecodedVideo,
    VideoError,
    VideoSettings,
    grid_timestamps,
    patchify_video,
    read_clip,
    seconds_per_grid,
    video_grid,
)
from megatron_ral.functional.positions import multimodal_positions
from megatron_ral.rewards.answer import taught_solution
from megatron_ral.types import Prompt, Sample

END_OF_TURN = "<|im_end|>"


class _Visual:
    """One image or video of a sample: its patches and how its tokens stand in the text.

    Args:
        pixels: [patches, width] float32; None where only lengths are asked.
        grid: [3] int64.
        seconds: of one temporal patch of a video; None: an image.
        stamps: time stamps of the temporal patches where each is a run of its own; None: one run.
        targets: [tokens] bool, tokens that show what is asked for; None: none does.
    """

    def __init__(
        self,
        pixels: Optional[Tensor],
        grid: Tensor,
        seconds: float | None = None,
        stamps: list[float] | None = None,
        targets: Tensor | None = None,
    ):
        self.pixels, self.grid, self.seconds, self.stamps, self.targets = pixels, grid, seconds, stamps, targets
        self.is_video = seconds is not None

    def runs(self) -> Tensor:
        """Grid of each run of visual tokens, [runs, 3]."""
        return (
            self.grid[None] if self.stamps is None else self.grid.new_tensor([[1, *self.grid[1:]]] * len(self.stamps))
        )


class PromptProcessor:
    """Turns samples into prompts for one checkpoint folder.

    Args:
        path: Hugging Face folder with config, tokenizer and image processor.
        max_prompt_length: tokens, visual tokens included; a longer prompt raises SampleError.
        include_process: whether the reference response has the reasoning before the answer.
        max_visual_tokens: visual tokens of a prompt, likewise; 0: as many as max_prompt_length allows.
        prompt_suffix: text after every question.

    Several threads may call one processor.

    Raises:
        ConfigError: no usable tokenizer or image processor in the folder.
    """

    def __init__(
        self,
        path: str,
        max_prompt_length: int,
        include_process: bool = True,
        max_visual_tokens: int = 0,
        prompt_suffix: str = "",
    ):
        try:
            config = AutoConfig.from_pretrained(path)
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"'{path}' holds no usable tokenizer and image processor ({' '.join(str(error).split())[:200]})"
            ) from None
        self.max_prompt_length, self.include_process = max_prompt_length, include_process
        self.max_visual_tokens, self._text_lock = max_visual_tokens, threading.Lock()
        self.prompt_suffix = prompt_suffix
        self.image_token_id, self.video_token_id = config.image_token_id, config.video_token_id
        names = (self.image_token_id, self.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
        self.image_token, self.video_token, self.vision_start, self.vision_end = self.tokenizer.convert_ids_to_tokens(
            names
        )
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
        self._refuse_stray_targets(sample)
        images = [self._open_image(sample, data, decode=True) for data in sample.images]
        visuals = [
            *self._image_visuals(sample, images),
            *(self._video_visual(sample, number) for number in range(len(sample.videos))),
        ]
        input_ids = torch.tensor(self._tokenize(sample, visuals))
        visual_mask = (input_ids == self.image_token_id) | (input_ids == self.video_token_id)
        num_features = sum(len(visual.pixels) for visual in visuals) // self.merge_size**2
        if int(visual_mask.sum()) != num_features:
            raise SampleError(
                f"sample '{sample.key}': {int(visual_mask.sum())} visual tokens in the text but "
                f"{num_features} visual features",
                "token_mismatch",
            )
        self._check_lengths(sample, len(input_ids), num_features)
        runs = [visual.runs() for visual in visuals]
        intervals = [self._temporal_interval(visual) for visual, grids in zip(visuals, runs) for _ in grids]
        position_ids, next_position = multimodal_positions(
            visual_mask, torch.cat(runs) if runs else torch.zeros(0, 3, dtype=torch.int64), self.merge_size, intervals
        )
        grids = [visual.grid for visual in visuals]
        reference = (sample.process if self.include_process else "") + taught_solution(sample.solution)
        return Prompt(
            sample=sample,
            input_ids=input_ids,
            position_ids=position_ids,
            next_position=next_position,
            pixel_values=visuals[0].pixels
            if len(visuals) == 1
            else torch.cat([torch.zeros(0, self.pixel_width), *(visual.pixels for visual in visuals)]),
            grid_thw=torch.stack(grids) if grids else torch.zeros(0, 3, dtype=torch.int64),
            is_video=torch.tensor([visual.is_video for visual in visuals], dtype=torch.bool),
            seconds_per_grid=torch.tensor([visual.seconds or 0.0 for visual in visuals]),
            visual_mask=visual_mask,
            target_mask=self._target_mask(visuals, visual_mask),
            response_ids=torch.tensor(self._token_ids(reference) + [self.end_token_id]),
        )

    def lengths(self, sample: Sample) -> SampleLengths:
        """Lengths of the prompt this processor would make, from sizes of pictures and packets of videos: no picture is
        decoded, and one frame of a video. The limits of this processor do not count, and the reference response is
        measured with its reasoning.

        Raises:
            SampleError: as far as headers tell.
        """
        self._refuse_control_tokens(sample)
        self._refuse_stray_targets(sample)
        images = [self._open_image(sample, data, decode=False) for data in sample.images]
        visuals = [
            *self._image_visuals(sample, images, measure_only=True),
            *(self._video_visual(sample, number, measure_only=True) for number in range(len(sample.videos))),
        ]
        return SampleLengths(
            prompt_length=len(self._tokenize(sample, visuals)),
            visual_tokens=sum(int(visual.grid.prod()) for visual in visuals) // self.merge_size**2,
            response_length=len(self._token_ids(sample.process + taught_solution(sample.solution))) + 1,
            num_images=len(images),
            num_videos=len(sample.videos),
            problem_type=sample.problem_type,
        )

    def fingerprint(self) -> str:
        """Of all that decides the lengths of a sample: tokenizer, chat template, sizes of pictures and videos."""
        picture = {
            name: getattr(self.image_processor, name, None)
            for name in ("do_resize", "patch_size", "temporal_patch_size", "merge_size")
        }
        size = {name: self.image_processor.size[name] for name in ("shortest_edge", "longest_edge")}
        rules = [
            2,
            self.tokenizer.backend_tokenizer.to_str(),
            self.tokenizer.chat_template,
            self.prompt_suffix,
            picture,
            size,
            asdict(self.video),
            self.timed_frames,
            self.image_token_id,
            self.video_token_id,
        ]
        return blake2b(json.dumps(rules, sort_keys=True).encode(), digest_size=16).hexdigest()

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
                raise ConfigError(
                    f"{other_key} has another tokenizer than {key}: token {token!r} has {names[1]} in "
                    f"{other_key} and {names[0]} in {key}; distil from a model with the same tokenizer"
                )
        for name, mine in ours.items():
            if mine != theirs[name]:
                values = [mine, theirs[name]]
                if all(isinstance(value, list) for value in values):  # merges: the first that differs
                    at = next(
                        (index for index, pair in enumerate(zip(*values)) if pair[0] != pair[1]), min(map(len, values))
                    )
                    name, values = f"{name}[{at}]", [value[at] if at < len(value) else "missing" for value in values]
                raise ConfigError(
                    f"{other_key} has another tokenizer than {key}: {name} is {str(values[1])[:120]} in "
                    f"{other_key} and {str(values[0])[:120]} in {key}; distil from a model with the same "
                    "tokenizer"
                )
        for name in ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "rescale_factor"):
            values = [getattr(processor.image_processor, name, None) for processor in (other, self)]
            if values[0] != values[1]:
                raise ConfigError(
                    f"{other_key} makes other patches of a picture than {key}: {name} is {values[0]} in "
                    f"{other_key} and {values[1]} in {key}; distil from a model with the same visual grid"
                )

    def _token_rules(self) -> dict[str, Any]:
        """How the tokenizer cuts text, beside its vocabulary."""
        rules = json.loads(self.tokenizer.backend_tokenizer.to_str())
        model = rules["model"]
        return {
            "merges": model.get("merges"),
            "type": model.get("type"),
            "normalizer": rules.get("normalizer"),
            "pre_tokenizer": rules.get("pre_tokenizer"),
        }

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

    def _check_lengths(self, sample: Sample, prompt_length: int, visual_tokens: int) -> None:
        passed = self.limit_passed(prompt_length, visual_tokens)
        if passed is not None:
            raise SampleError(f"sample '{sample.key}': {passed[1]}", passed[0])

    def limit_passed(self, prompt_length: int, visual_tokens: int) -> Optional[tuple[str, str]]:
        """(reason, text) of the limit that a prompt passes."""
        if self.max_visual_tokens and visual_tokens > self.max_visual_tokens:
            return "too_many_visual_tokens", (
                f"{visual_tokens} visual tokens are more than data.max_visual_tokens = {self.max_visual_tokens}"
            )
        if prompt_length > self.max_prompt_length:
            return "prompt_too_long", (
                f"prompt of {prompt_length} tokens is longer than data.max_prompt_length = {self.max_prompt_length}"
            )
        return None

    def _open_image(self, sample: Sample, data: bytes, *, decode: bool) -> Image.Image:
        """An image, its declared size checked before a pixel is decoded."""
        try:
            image = open_image(data)
            return image.convert("RGB") if decode else image
        except Image.DecompressionBombError as error:
            raise SampleError(
                f"sample '{sample.key}': image declares too many pixels ({error}); at most {MAX_SIDE} on a "
                f"side and {MAX_IMAGE_PIXELS} in all",
                "image_too_large",
            ) from None
        except Exception as error:  # PIL raises many types; each of them means this one picture is unusable
            raise SampleError(f"sample '{sample.key}': image cannot be decoded ({error})", "broken_image") from None

    def _refuse_control_tokens(self, sample: Sample) -> None:
        """Text that holds a special token of the checkpoint would end a turn or ask for visual features."""
        for field in ("problem", "process", "solution"):
            for token in self.tokenizer.all_special_tokens:
                if token in getattr(sample, field):
                    raise SampleError(
                        f"sample '{sample.key}': its {field} contains the special token {token}, which is "
                        "not text to this model; remove it",
                        "special_token",
                    )

    def _refuse_stray_targets(self, sample: Sample) -> None:
        for boxes, media, field, kind, way in (
            (sample.target_boxes, sample.images, "target_boxes", "image", "a video has target_frames"),
            (sample.target_frames, sample.videos, "target_frames", "video", "an image has target_boxes"),
        ):
            if boxes and not media:
                raise SampleError(
                    f"sample '{sample.key}' has {field} but no {kind} they could lie in ({way})", "target_box"
                )

    def _image_visuals(
        self, sample: Sample, images: Sequence[Image.Image], measure_only: bool = False
    ) -> list[_Visual]:
        try:
            visuals = [
                _Visual(None, image_grid(image, self.image_processor))
                if measure_only
                else _Visual(*patchify_image(image, self.image_processor))
                for image in images
            ]
        except ValueError as error:  # an aspect ratio that the processor refuses
            raise SampleError(f"sample '{sample.key}': image cannot be used ({error})", "broken_image") from None
        if sample.target_boxes:
            rows, columns = self._token_grid(visuals[0].grid)[1:]
            try:
                visuals[0].targets = image_cells(sample.target_boxes, *images[0].size, rows, columns).flatten()
            except TargetError as error:
                raise SampleError(f"sample '{sample.key}': {error}", "target_box") from None
        return visuals

    def _video_visual(self, sample: Sample, number: int, measure_only: bool = False) -> _Visual:
        try:
            clip = read_clip(sample.videos[number], self.video, measure_only=measure_only)
            pixels, grid = (None, self._clip_grid(clip)) if measure_only else patchify_video(clip, self.video)
        except VideoError as error:
            raise SampleError(f"sample '{sample.key}': {error}", "broken_video") from None
        targets = None
        if number == 0 and sample.target_frames:
            try:
                targets = clip_cells(
                    sample.target_frames, clip, self._token_grid(grid), self.video.temporal_patch_size
                ).flatten()
            except TargetError as error:
                raise SampleError(f"sample '{sample.key}': {error}", "target_box") from None
        stamps = grid_timestamps(clip, self.video) if self.timed_frames else None
        return _Visual(pixels, grid, seconds_per_grid(clip, self.video), stamps, targets)

    def _clip_grid(self, clip: DecodedVideo) -> Tensor:
        return torch.tensor(video_grid(len(clip.frames), *clip.frames.shape[2:], self.video))

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
        with self._text_lock:
            question = {"type": "text", "text": sample.problem + self.prompt_suffix}
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": [*content, question]}], tokenize=False, add_generation_prompt=True
            )
        expanded = ""
        for number, visual in enumerate(visuals):
            place = self.video_token if visual.is_video else self.image_token
            if visual.stamps is not None:
                place = self.vision_start + place + self.vision_end
            before, found, text = text.partition(place)
            if not found or self.image_token in before or self.video_token in before:
                raise SampleError(
                    f"sample '{sample.key}': the chat template of this checkpoint has no {place} for "
                    f"image or video {number}",
                    "token_mismatch",
                )
            expanded += before + self._visual_text(visual)
        return self._token_ids(expanded + text)

    def _token_ids(self, text: str) -> list[int]:
        with self._text_lock:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _visual_text(self, visual: _Visual) -> str:
        """Tokens that stand for one image or video.

        With time stamps they replace the template's whole <|vision_start|><|video_pad|><|vision_end|>, as Qwen3-VL's
        processor did in transformers 4.57; version 5 replaces the middle alone and keeps an outer pair of tokens.
        """
        counts = (visual.runs().prod(dim=1) // self.merge_size**2).tolist()
        if visual.stamps is None:
            return (self.video_token if visual.is_video else self.image_token) * counts[0]
        return "".join(
            f"<{stamp:.1f} seconds>{self.vision_start}{self.video_token * count}{self.vision_end}"
            for stamp, count in zip(visual.stamps, counts)
        )

    def _target_mask(self, visuals: Sequence[_Visual], visual_mask: Tensor) -> Tensor:
        """Visual tokens that show what is asked for: of the first image, of the first video."""
        mask = torch.zeros_like(visual_mask)
        mask[visual_mask] = torch.cat(
            [
                torch.zeros(0, dtype=torch.bool),
                *(
                    visual.targets
                    if visual.targets is not None
                    else torch.zeros(len(visual.pixels) // self.merge_size**2, dtype=torch.bool)
                    for visual in visuals
                ),
            ]
        )
        return mask
