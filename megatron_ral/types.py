"""One frozen dataclass per arrow of the pipeline. A stage makes the next type and never adds to what it received.

    Sample -> Prompt -> PromptBatch -> (sample) ResponseBatch -> (reward) Score -> SftBatch | RlBatch -> losses

Suffixes of shapes: B prompt groups, G responses of a group, R response tokens (padded), P prompt tokens (padded),
S = P + R keys of a response row, V images and videos.
"""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import PurePath
from typing import Any, Mapping, Optional, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def to_device(value: Any, device: torch.device) -> Any:
    """Return the same value with its tensors on `device`: tensors, tuples, mappings and dataclasses of them.

    A `Prompt` stays where it is, because its pixels go to the device only when the vision tower reads them.
    """
    if torch.is_tensor(value):
        return value.to(device, non_blocking=True)
    if isinstance(value, Prompt):
        return value
    if isinstance(value, tuple):
        return tuple(to_device(item, device) for item in value)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: to_device(getattr(value, item.name), device) for item in fields(value)})
    return value


@dataclass(frozen=True)
class FramePictures:
    """Video given as single pictures."""

    pictures: tuple[bytes, ...]
    """Encoded image files in time order."""
    fps: float
    """Pictures per second."""


Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in pixels of the upright picture (`data/pictures.py`), before it is resized."""


@dataclass(frozen=True)
class TargetFrames:
    """Part of a video that shows what the question asks for."""

    seconds: tuple[float, float]
    """Interval [start, end) in seconds after the video's first frame."""
    boxes: tuple[Box, ...] = ()
    """Boxes in pixels of a frame. Empty: the whole frame."""


@dataclass(frozen=True)
class Sample:
    """One entry of a shard, checked but not decoded."""

    key: str
    shard: str
    problem: str
    solution: str
    """Reference answer, e.g. `<answer>7</answer>`. Several tags are several reference answers (VizWiz has ten)."""
    process: str
    """Reasoning for supervised training, e.g. `<think>..</think>`. It may be empty."""
    problem_type: str
    """Name that chooses the accuracy rule with reward.accuracy = by_type, e.g. `multiple choice`. It may be empty."""
    images: tuple[bytes, ...]
    """Encoded image files, in the order of the question."""
    target_boxes: tuple[Box, ...]
    """Annotated boxes in the first image. Empty where nothing is annotated."""
    videos: tuple[bytes | FramePictures, ...] = ()
    """Encoded video files or pictures, shown after the images."""
    target_frames: tuple[TargetFrames, ...] = ()
    """Annotated parts of the first video. Empty where nothing is annotated."""
    category: str = ""
    """Heading under which an evaluation reports the sample, e.g. a task of a benchmark. Empty: problem_type."""
    question_group: str = ""
    """Name of a group of questions that is right where all of them are (MME: the two of a picture). It may be empty."""
    options: tuple[str, ...] = ()
    """Contents of the options of a multiple choice in the order of their letters. Empty where they are not known."""

    @property
    def identity(self) -> str:
        """Shard name and key, because keys need only be unique inside a shard."""
        return f"{PurePath(self.shard).name}/{self.key}"


@dataclass(frozen=True)
class Patches:
    """Patches of one image or video as bytes, each of which stands for a normalised number.

    Bytes are an eighth of a picture's numbers and a quarter of a video's. The numbers are looked up where they are
    read, which gives those of the image processor bit for bit (`functional/patches.py`).
    """

    pixels: Tensor
    """Bytes in the order of visual tokens, [patches, frames, patch * patch, channels] uint8: colours stand together, as
    in a picture. The patches of one visual token are neighbours."""
    levels: Tensor
    """Number that each byte stands for, [channels, 256] float32."""
    repeats: int = 1
    """Times that the one frame of a picture stands in a patch; 1 for a video."""

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: slice) -> "Patches":
        return replace(self, pixels=self.pixels[rows])

    @property
    def ordered_bytes(self) -> Tensor:
        """Bytes in the order of `values`, [patches, channels * temporal * patch * patch] uint8."""
        return self._repeated(self.pixels.permute(0, 3, 1, 2))

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the numbers, [patches, channels * temporal * patch * patch], on the device of the bytes.

        Args:
            dtype: type of the result, to which the float32 numbers are rounded.
        """
        pixels = self.pixels.permute(0, 3, 1, 2).contiguous()  # put in order while they are bytes
        levels = self.levels.to(pixels.device, dtype).flatten()
        first = 256 * torch.arange(len(self.levels), dtype=torch.int32, device=pixels.device)
        found = levels.index_select(0, (pixels + first[:, None, None]).flatten())
        return self._repeated(found.view(pixels.shape))

    def _repeated(self, values: Tensor) -> Tensor:
        if self.repeats > 1:
            values = values.expand(-1, -1, self.repeats, -1)
        return values.reshape(len(values), values.shape[1:].numel())


@dataclass(frozen=True)
class Prompt:
    """Sample in the form that the model reads."""

    sample: Sample
    input_ids: Tensor
    """Token ids [P] int64, with visual tokens expanded."""
    position_ids: Tensor
    """Rotary positions [3, P] int64."""
    next_position: int
    """Rotary position of the first response token."""
    patches: tuple[Patches, ...]
    """Patches of each image and video in the order of their tokens, [V]."""
    grid_thw: Tensor
    """Patches of each image and video along time, height and width, [V, 3] int64. Tiles of an image lie along time."""
    is_video: Tensor
    """Mask of the videos, [V] bool."""
    seconds_per_grid: Tensor
    """Seconds of one temporal patch, [V] float32. 0 for images."""
    visual_mask: Tensor
    """Mask of the visual tokens (of images and videos), [P] bool."""
    target_mask: Tensor
    """Mask of the visual tokens of the first image in a target box, and of the first video in its target frames,
    [P] bool."""
    response_ids: Tensor
    """Reference response for supervised training, end-of-turn token included, [R] int64."""

    @property
    def num_patches(self) -> int:
        """Number of patches of all images and videos."""
        return sum(map(len, self.patches))

    @property
    def pixel_values(self) -> Tensor:
        """Normalised patches of all images and videos, [patches, channels * temporal * patch * patch] float32.

        They are formed at each call. Text alone has [0, 0].
        """
        return torch.cat([patches.values() for patches in self.patches]) if self.patches else torch.zeros(0, 0)


@dataclass(frozen=True)
class PromptBatch:
    """B prompts, padded on the right."""

    prompts: tuple[Prompt, ...]
    input_ids: Tensor
    """[B, P] int64."""
    prompt_lengths: Tensor
    """[B] int64."""
    position_ids: Tensor
    """[3, B, P] int64."""
    next_position: Tensor
    """[B] int64."""
    visual_mask: Tensor
    """[B, P] bool."""
    target_mask: Tensor
    """[B, P] bool."""

    @property
    def identities(self) -> tuple[str, ...]:
        """Identities of the samples, in order."""
        return tuple(prompt.sample.identity for prompt in self.prompts)

    @property
    def is_annotated(self) -> Tensor:
        """Mask of the prompts with annotated visual tokens, [B] bool."""
        return self.target_mask.any(dim=-1)

    def __len__(self) -> int:
        return len(self.prompts)


def pad_prompts(prompts: Sequence[Prompt], pad_token_id: int, length: int = 0) -> PromptBatch:
    """Pad prompts on the right to the longest of them, or to `length` if that is longer."""

    def pad(rows: list[Tensor], value: int | bool) -> Tensor:
        padded = pad_sequence(rows, batch_first=True, padding_value=value)
        missing = length - padded.shape[1]
        return torch.nn.functional.pad(padded, (0, missing), value=value) if missing > 0 else padded

    return PromptBatch(
        prompts=tuple(prompts),
        input_ids=pad([prompt.input_ids for prompt in prompts], pad_token_id),
        prompt_lengths=torch.tensor([len(prompt.input_ids) for prompt in prompts]),
        position_ids=torch.stack([pad([prompt.position_ids[axis] for prompt in prompts], 0) for axis in range(3)]),
        next_position=torch.tensor([prompt.next_position for prompt in prompts]),
        visual_mask=pad([prompt.visual_mask for prompt in prompts], False),
        target_mask=pad([prompt.target_mask for prompt in prompts], False),
    )


@dataclass(frozen=True)
class ResponseBatch:
    """G sampled responses for each of B prompts."""

    prompts: PromptBatch
    response_ids: Tensor
    """Token ids [B, G, R] int64, padded on the right."""
    response_lengths: Tensor
    """Lengths with the end-of-turn token, [B, G] int64."""
    rollout_logprobs: Tensor
    """Log-probabilities under the sampler, at its temperature and before top-p, [B, G, R] float32. They serve as a
    check and as the denominator of `loss.sampler_correction`, and are never used as `old_logprobs`."""
    finished: Tensor
    """Mask of the responses that ended with the end-of-turn token rather than at the length limit, [B, G] bool."""
    attention: Mapping[int, Tensor] = field(default_factory=dict)
    """Recorded layer -> attention of the rows that predict each token, as decoding saw it, [B, G, R, P + R] float32
    over all heads. On the stage that owns the layer. Rows behind a response's end have no meaning."""


@dataclass(frozen=True)
class Score:
    """Rewards of a ResponseBatch."""

    rewards: Tensor
    """[B, G] float32."""
    components: Mapping[str, Tensor]
    """Parts of the reward before weighting (accuracy, format, ...), and `unparsed` and `error`, 0 or 1. Each [B, G]
    float32."""
    texts: tuple[tuple[str, ...], ...]
    """Decoded responses [B][G]."""
    problems: tuple[tuple[tuple[str, ...], ...], ...] = ()
    """Failures in scoring [B][G], each as `kind: detail`."""

    def select(self, rows: Sequence[int]) -> "Score":
        """Return the score of some groups, in the given order."""
        index = torch.tensor(rows, dtype=torch.int64)
        return Score(
            self.rewards[index],
            {name: values[index] for name, values in self.components.items()},
            tuple(self.texts[row] for row in rows),
            tuple(self.problems[row] for row in rows) if self.problems else (),
        )

    @staticmethod
    def join(scores: Sequence["Score"]) -> "Score":
        """Return the score of the groups of several scores, one after the other."""
        return Score(
            torch.cat([score.rewards for score in scores]),
            {name: torch.cat([score.components[name] for score in scores]) for name in scores[0].components},
            tuple(group for score in scores for group in score.texts),
            tuple(group for score in scores for group in score.problems),
        )


@dataclass(frozen=True)
class GroupBatch:
    """B prompt groups in the layout [prompt | response 1 | ... | response G], the input of one forward pass."""

    prompts: PromptBatch
    response_ids: Tensor
    """[B, G, R] int64."""
    response_lengths: Tensor
    """[B, G] int64."""
    visual_embeds: Optional[tuple[Tensor, ...]] = None
    """Outputs of a frozen vision tower per prompt, [visual tokens, 1 + D, H] (see MultimodalStage.encode_visual). None:
    the pass encodes the pixels."""
    answer_tokens: Optional[Tensor] = None
    """Index of the response token with which the answer begins, [B, G] int64; -1 where a response has no answer. None:
    not looked for."""

    @cached_property
    def response_mask(self) -> Tensor:
        """Mask of the real response tokens, [B, G, R] bool."""
        steps = torch.arange(self.response_ids.shape[2], device=self.response_ids.device)
        return steps < self.response_lengths[..., None]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of prompts and responses, without padding."""
        return int(self.prompts.prompt_lengths.sum() + self.response_lengths.sum())

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class StepTotals:
    """Denominators of the losses: counts over all micro-batches and data-parallel ranks of an optimizer step.

    They count the groups that take part and are at least 1, so that a step without any has the loss 0 and not 0 / 0.
    """

    num_tokens: int
    """Number of response tokens."""
    num_sequences: int
    """Number of responses."""
    max_response_length: int
    """Limit of the generation, a constant of the run."""


@dataclass(frozen=True)
class SftBatch:
    """Micro-batch of supervised training: reference responses as groups of one."""

    groups: GroupBatch
    totals: StepTotals

    @property
    def loss_mask(self) -> Tensor:
        """Mask of the response tokens that count, [B, 1, R] bool."""
        return self.groups.response_mask


@dataclass(frozen=True)
class TeacherOutputs:
    """Outputs of the teacher for one micro-batch, each on the student's stage that reads it. No teacher: empty."""

    hidden: Optional[Tensor] = None
    """Inputs of the teacher's LM head at the rows that predict the response tokens, without padding and in the order of
    groups, [N, H of the teacher]."""
    attention: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer of the student -> attention distributions [B, G, R, S] float32 of the teacher's layer at its depth."""


@dataclass(frozen=True)
class RlBatch:
    """Micro-batch of prompt groups with the inputs of every term of an RL objective.

    Log-probabilities are present on the last pipeline stage alone, attention on the stage that owns the layer.
    """

    groups: GroupBatch
    totals: StepTotals
    group_mask: Tensor
    """Mask of the groups that count in losses and totals, [B] bool."""
    advantages: Tensor
    """[B, G] float32."""
    attention_advantages: Tensor
    """Advantages of the attention term, [B, G] float32: `advantages`, or in a control the same in another order."""
    rollout_logprobs: Tensor
    """Log-probabilities under the sampler, [B, G, R] float32, see ResponseBatch."""
    from_teacher: Tensor
    """Mask of the groups whose responses are the teacher's, [B] bool."""
    is_on_policy: bool
    """True if the policy still is the one that made the rollout. `old_logprobs` and target attention then come from the
    update's own pass, without gradient."""
    compares_sampler: bool
    """True if the difference between sampler and training engine is measured (first update of a rollout)."""
    old_logprobs: Optional[Tensor] = None
    """Log-probabilities [B, G, R] float32 under the rollout policy, by the training engine. None if `is_on_policy`."""
    ref_logprobs: Optional[Tensor] = None
    """Log-probabilities [B, G, R] float32 under the frozen reference. None: there is no reference."""
    target_attention: Mapping[int, Any] = field(default_factory=dict)
    """Layer -> target of the attention divergence, in the form that the target stores."""
    teacher: TeacherOutputs = field(default_factory=TeacherOutputs)

    @cached_property
    def loss_mask(self) -> Tensor:
        """Mask of the response tokens that count, [B, G, R] bool."""
        return self.groups.response_mask & self.group_mask[:, None, None]


TrainBatch = SftBatch | RlBatch
"""Micro-batch of either kind of training."""
