"""Sample -> Prompt: chat template, visual tokens, rotary positions, target mask.

`visuals.py` makes the patches with the settings of the checkpoint's image processor. The tokenizer is the one of the
checkpoint folder (`format_tags.py` says where it is edited). Visual tokens are counted here, where the sample's key is
known for the error. A model folder is tried on one image and one video before any sample is read.
"""

import io
import json
import threading
from dataclasses import asdict
from hashlib import blake2b
from typing import Any, Optional, Sequence, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_ral.config import RunConfig
from megatron_ral.data.chat_template import PROBE_QUESTION, prefilled_text, render, without_prefilled
from megatron_ral.data.format_tags import AUTO, choose_tags, edited_tokenizer
from megatron_ral.data.index import SampleLengths
from megatron_ral.data.issues import SampleError
from megatron_ral.data.model_inputs import check_image_processor, load_inputs, vision_tokens
from megatron_ral.data.same_inputs import check_same_patches, check_same_tokenizer
from megatron_ral.data.video import VideoSettings
from megatron_ral.data.visuals import Visual, VisualReader
from megatron_ral.errors import ConfigError
from megatron_ral.models.folder import config_folder
from megatron_ral.rewards.answer import taught_response
from megatron_ral.types import FramePictures, Patches, Prompt, Sample

FINGERPRINT_VERSION = 3


class PromptProcessor:
    """Maker of prompts for one checkpoint folder. Several threads may call it.

    Args:
        path: Hugging Face folder with config, tokenizer and image processor.
        max_prompt_length: most tokens of a prompt, visual tokens included; a longer one raises SampleError.
        include_process: reasoning before the answer as part of the reference response.
        max_visual_tokens: most visual tokens of a prompt, likewise; 0: as many as `max_prompt_length` allows.
        prompt_suffix: text after every question.
        format_tags: form of the format's tags, `auto`, `text` or `token`; see `format_tags.choose_tags`.

    Raises:
        ConfigError: an unknown family, no usable tokenizer, chat template or image processor in the folder, or files
            that do not fit each other.
        CheckpointError: files of the folder were not fetched.
    """

    def __init__(
        self,
        path: str,
        max_prompt_length: int,
        include_process: bool = True,
        max_visual_tokens: int = 0,
        prompt_suffix: str = "",
        format_tags: str = AUTO,
    ):
        self.config, self.family, tokenizer, self.image_processor = load_inputs(path)
        self.format_tags = choose_tags(tokenizer, format_tags)
        self.tokenizer: Any = edited_tokenizer(tokenizer, self.format_tags)
        self.tokenizer.backend_tokenizer.no_truncation()  # which a tokenizer.json may ask for; a stock call undoes it
        self.tokenizer.backend_tokenizer.no_padding()
        self.max_prompt_length, self.include_process = max_prompt_length, include_process
        self.max_visual_tokens, self._text_lock = max_visual_tokens, threading.Lock()
        self.prompt_suffix = prompt_suffix
        self.vision_tokens = vision_tokens(path, self.family, self.config, self.tokenizer)
        self.image_token_id, self.video_token_id, _ = self.family.token_ids(self.config)
        self.vision = self.family.vision_config(self.config)
        check_image_processor(path, self.image_processor, self.family.image_processor_sizes(self.vision))
        self.rules = self.family.patch_rules(self.vision)
        self.reader = VisualReader(self.image_processor, self.family, self.rules)
        self.end_token_id = self.tokenizer.convert_tokens_to_ids(self.family.end_of_turn)
        self.pad_token_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        if self.end_token_id is None or self.end_token_id == self.tokenizer.unk_token_id:
            raise ConfigError(f"'{path}'", None, f"holds a tokenizer without the token {self.family.end_of_turn}")
        placeholders = {
            "image": self.vision_tokens.image,
            "video": self.family.video_placeholder(self.vision_tokens),
        }
        tokens, has_pair = self.vision_tokens, self.family.template_has_pair
        pair = (tokens.start, tokens.end) if has_pair else ("", "")
        self.response_prefix = prefilled_text(self.tokenizer, path, placeholders, pair, self.family.end_of_turn)
        """Text that the chat template writes of every response (`<think>`), among the prompt's tokens; mostly none."""
        self._try_visuals(path)

    @classmethod
    def from_config(cls, config: RunConfig, training: bool = True) -> "PromptProcessor":
        """Return the processor of a run.

        Args:
            config: settings of the run.
            training: False: the limit of visual tokens, which is one of training, does not apply.

        Raises:
            ConfigError: the folder cannot be used, or its chat template contradicts the format that is rewarded.
            CheckpointError: files of the folder were not fetched.
        """
        processor = cls(
            str(config_folder(config.model.path)),
            config.data.max_prompt_length,
            config.data.include_process,
            config.data.max_visual_tokens if training else 0,
            config.data.prompt_suffix,
            config.model.format_tags,
        )
        if processor.response_prefix and not config.reward.require_think:
            raise ConfigError(
                "reward.require_think",
                False,
                f"asks for responses without a thought, but the chat template of '{config.model.path}' begins "
                "each with <think>; take true, or a template that does not",
            )
        return processor

    @property
    def video(self) -> VideoSettings:
        """Return the rules by which videos become patches."""
        return self.reader.video

    def __call__(self, sample: Sample) -> Prompt:
        """Return the prompt of a sample.

        Raises:
            SampleError: an image or video cannot be decoded or does not match its tokens, the prompt is too long, or a
                box or span lies outside the image or video. The text names the sample's key.
        """
        self._refuse_control_tokens(sample)
        return self._prompt(sample)

    def _prompt(self, sample: Sample, limited: bool = True) -> Prompt:
        """Return the prompt of a sample, within the limits of this processor or (False) of any length."""
        # In NumPy up to the prompt, because operations of PyTorch on a few numbers take longer than the work itself.
        visuals = self.reader.read(sample)
        input_ids = self._tokenize(sample, visuals)
        visual_mask = (input_ids == self.image_token_id) | (input_ids == self.video_token_id)
        patches = tuple(cast(Patches, visual.patches) for visual in visuals)
        num_features = sum(map(len, patches)) // self.rules.merge_size**2
        if visual_mask.sum() != num_features:
            raise SampleError(
                f"sample '{sample.key}': {visual_mask.sum()} visual tokens in the text but "
                f"{num_features} visual features",
                "token_mismatch",
            )
        passed = self.limit_passed(len(input_ids), num_features) if limited else None
        if passed is not None:
            raise SampleError(f"sample '{sample.key}': {passed[1]}", passed[0])
        runs = [self.reader.run_grids(visual) for visual in visuals]
        intervals = [self._temporal_interval(visual) for visual, grids in zip(visuals, runs) for _ in grids]
        no_grids = torch.zeros(0, 3, dtype=torch.int64)
        position_ids, next_position = self.family.positions(
            torch.from_numpy(visual_mask), torch.cat([no_grids, *runs]), self.rules.merge_size, intervals
        )
        target_mask = np.zeros_like(visual_mask)
        if any(visual.targets.any() for visual in visuals):
            target_mask[visual_mask] = np.concatenate([visual.targets.numpy() for visual in visuals])
        return Prompt(
            sample=sample,
            input_ids=torch.from_numpy(input_ids),
            position_ids=position_ids,
            next_position=next_position,
            patches=patches,
            grid_thw=torch.stack([visual.grid for visual in visuals]) if visuals else no_grids,
            is_video=torch.tensor([visual.is_video for visual in visuals], dtype=torch.bool),
            seconds_per_grid=torch.tensor([visual.seconds for visual in visuals]),
            visual_mask=torch.from_numpy(visual_mask),
            target_mask=torch.from_numpy(target_mask),
            response_ids=torch.tensor(self._reference_ids(sample, self.include_process)),
        )

    def lengths(self, sample: Sample) -> SampleLengths:
        """Return the lengths of the prompt that this processor would make.

        They follow from sizes of pictures and packets of videos: no picture is decoded, and one frame of a video. The
        limits of this processor do not apply, and the reference response is measured with its reasoning.

        Raises:
            SampleError: a fault that the headers show.
        """
        self._refuse_control_tokens(sample)
        visuals = self.reader.read(sample, measure_only=True)
        return SampleLengths(
            prompt_length=len(self._tokenize(sample, visuals)),
            visual_tokens=sum(int(visual.grid.prod()) for visual in visuals) // self.rules.merge_size**2,
            response_length=len(self._reference_ids(sample, include_process=True)),
            num_images=len(sample.images),
            num_videos=len(sample.videos),
            problem_type=sample.problem_type,
        )

    def fingerprint(self) -> str:
        """Return a digest of the rules behind a sample's lengths: tokenizer, chat template, sizes of media."""
        rules = [
            FINGERPRINT_VERSION,
            self.tokenizer.backend_tokenizer.to_str(),
            self.tokenizer.chat_template,
            self.prompt_suffix,
            *self.family.image_size_rules(self.image_processor),
            {name: value for name, value in asdict(self.video).items() if name != "frame" or value},
            self.family.timed_video,
            self.image_token_id,
            self.video_token_id,
            *([self.response_prefix] if self.response_prefix else []),
        ]
        return blake2b(json.dumps(rules, sort_keys=True).encode(), digest_size=16).hexdigest()

    def check_same(self, path: str, key: str, other_key: str) -> None:
        """Compare the inputs of another checkpoint, which gets the prompts of this processor.

        The chat template and the size limits of a picture may differ, because this processor alone makes the prompts.

        Args:
            path: Hugging Face folder of the other checkpoint.
            key: setting that names this processor's checkpoint, for the error.
            other_key: setting that names the other checkpoint, for the error.

        Raises:
            ConfigError: the first difference in tokens, their ids, the rules by which text is cut into them, or the
                rules by which a picture becomes patches.
            CheckpointError: files of the folder were not fetched.
        """
        _, _, tokenizer, image_processor = load_inputs(path)
        check_same_tokenizer(self.tokenizer, edited_tokenizer(tokenizer, self.format_tags), key, other_key)
        check_same_patches(self.image_processor, image_processor, key, other_key)

    def stock_inputs(self, prompt: Prompt, input_ids: Tensor) -> dict[str, Any]:
        """Return the inputs that transformers' own model takes for one sequence, for comparisons with it.

        Args:
            prompt: prompt that the sequence begins with.
            input_ids: [L] int64 tokens of the whole sequence.
        """
        return self.family.stock_inputs(prompt, input_ids, self.config)

    def decode(self, token_ids: Tensor) -> str:
        """Return the text of a response, prefilled text included and special tokens removed."""
        return self.response_prefix + self.tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)

    def limit_passed(self, prompt_length: int, visual_tokens: int) -> Optional[tuple[str, str]]:
        """Return (reason, text) of the limit that a prompt passes, or None."""
        if self.max_visual_tokens and visual_tokens > self.max_visual_tokens:
            return "too_many_visual_tokens", (
                f"{visual_tokens} visual tokens are more than data.max_visual_tokens = {self.max_visual_tokens}"
            )
        if prompt_length > self.max_prompt_length:
            return "prompt_too_long", (
                f"prompt of {prompt_length} tokens is longer than data.max_prompt_length = {self.max_prompt_length}"
            )
        return None

    def _refuse_control_tokens(self, sample: Sample) -> None:
        """Raise SampleError for text that holds a special token: it would end a turn or ask for visual features."""
        for field in ("problem", "process", "solution"):
            for token in self.tokenizer.all_special_tokens:
                if token in getattr(sample, field):
                    raise SampleError(
                        f"sample '{sample.key}': its {field} contains the special token {token}, which is "
                        "not text to this model; remove it",
                        "special_token",
                    )

    def _temporal_interval(self, visual: Visual) -> float:
        """Return the rotary positions from one temporal patch to the next."""
        return self.family.temporal_interval(self.vision, visual.seconds) if visual.is_video else 1.0

    def _tokenize(self, sample: Sample, visuals: Sequence[Visual]) -> np.ndarray:
        """Return the tokens of a prompt, [P] int64.

        Each run of visual tokens is one token of the text, which is repeated afterwards: tokenizing thousands of equal
        tokens takes longer than resizing a picture. `_try_visuals` checks that it makes no difference.
        """
        ids = np.array(self._token_ids(self._text(sample, visuals)), np.int64)
        visual = (ids == self.image_token_id) | (ids == self.video_token_id)
        runs = [length for each in visuals for length in self._run_lengths(each)]
        if visual.sum() != len(runs):
            raise SampleError(
                f"sample '{sample.key}': {visual.sum()} runs of visual tokens in the text but {len(runs)} to show",
                "token_mismatch",
            )
        lengths = np.ones_like(ids)
        lengths[visual] = runs
        return ids.repeat(lengths)

    def _run_lengths(self, visual: Visual) -> list[int]:
        """Return the visual tokens of each run of an image or video."""
        return [t * h * w // self.rules.merge_size**2 for t, h, w in self.reader.run_grids(visual).tolist()]

    def _text(self, sample: Sample, visuals: Sequence[Visual], expanded: bool = False) -> str:
        """Return the text of a prompt, with one placeholder per run of visual tokens or (True) per visual token."""
        kinds = ["video" if visual.is_video else "image" for visual in visuals]
        with self._text_lock:
            text = render(self.tokenizer, kinds, sample.problem + self.prompt_suffix)
        if (sample.problem + self.prompt_suffix).strip() not in text:
            raise SampleError(
                f"sample '{sample.key}': the chat template of this checkpoint changes the question", "token_mismatch"
            )
        tokens, whole = self.vision_tokens, ""
        for number, visual in enumerate(visuals):
            place = self.family.video_placeholder(tokens) if visual.is_video else tokens.image
            before, found, text = text.partition(place)
            if not found or tokens.image in before or tokens.video in before:
                raise SampleError(
                    f"sample '{sample.key}': the chat template of this checkpoint has no {place} for "
                    f"image or video {number}",
                    "token_mismatch",
                )
            lengths = self._run_lengths(visual)
            whole += before + self._visual_text(visual, lengths if expanded else [1] * len(lengths))
        return whole + text

    def _reference_ids(self, sample: Sample, include_process: bool) -> list[int]:
        """Return the tokens of the reference response that the model has to write, end of turn included."""
        reference = taught_response(sample.process, sample.solution, include_process)
        return [*self._token_ids(without_prefilled(reference, self.response_prefix)), self.end_token_id]

    def _token_ids(self, text: str) -> list[int]:
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def _visual_text(self, visual: Visual, lengths: Sequence[int]) -> str:
        """Return the text of one image or video, given the placeholders of each of its runs."""
        if visual.is_video:
            return self.family.video_text(self.vision_tokens, lengths, visual.stamps)
        return self.family.image_text(self.vision_tokens, lengths[0])

    def _try_visuals(self, path: str) -> None:
        """Make a prompt with an image and one with a video.

        Raises:
            ConfigError: tokens and visual features do not fit each other.
        """
        stream = io.BytesIO()
        Image.new("RGB", (4 * self.rules.token_side, 4 * self.rules.token_side), "grey").save(stream, "PNG")
        picture = stream.getvalue()
        for images, videos in (((picture,), ()), ((), (FramePictures((picture,) * 4, fps=2.0),))):
            sample = Sample("probe", "probe", PROBE_QUESTION, "", "", "", images, (), videos)
            try:
                prompt = self._prompt(sample, limited=False)
                width = prompt.pixel_values.shape[1]
                if width != self.rules.width:
                    raise ValueError(f"a patch has {width} numbers, but config.json asks for {self.rules.width}")
                text = self._text(sample, self.reader.read(sample), expanded=True)
                if prompt.input_ids.tolist() != self.tokenizer(text, add_special_tokens=False)["input_ids"]:
                    raise ValueError("its tokenizer does not make one token of each placeholder of a visual token")
            except Exception as error:  # code of the folder's processor meets pixels here for the first time
                kind, reason = "an image" if images else "a video", " ".join(str(error).split())[:200]
                raise ConfigError(
                    f"'{path}'",
                    None,
                    f"cannot make a prompt with {kind} ({reason}); its config.json, tokenizer and "
                    "preprocessor_config.json are not of one model",
                ) from None
