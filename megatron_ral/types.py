"""One frozen dataclass per arrow of the pipeline; a stage makes the next type and never adds to what it received.

Sample -> Prompt -> PromptBatch -> (generate) ResponseBatch -> (reward) Score -> TrainBatch -> losses
"""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import PurePath
from typing import Any, Mapping, Optional, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def to_device(value: Any, device: torch.device) -> Any:
    """The same value with its tensors on `device`: tensors, tuples, mappings and dataclasses of them.

    A `Prompt` stays where it is: its pixels go to the device only when the vision tower reads them.
    """
    if torch.is_tensor(value):
        return value.to(device, non_blocking=True)
    if isinstance(value, Prompt):
        return value
    if isinstance(value, tuple):
        return tuple(to_device(item, device) for item in value)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if is_dataclass(value):
        return replace(value, **{item.name: to_device(getattr(value, item.name), device) for item in fields(value)})
    return value


@dataclass(frozen=True)
class FramePictures:
    """A video as pictures that were taken out of it."""

    pictures: tuple[bytes, ...]
    """Encoded image files in time order."""
    fps: float
    """Pictures per second."""


Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in pixels of the picture as it is stored."""


@dataclass(frozen=True)
class TargetFrames:
    """Where and when a video shows what is asked for."""

    seconds: tuple[float, float]
    """[start, end) after the video's first frame."""
    boxes: tuple[Box, ...] = ()
    """In pixels of a frame; empty: the whole frame."""


@dataclass(frozen=True)
class Sample:
    """One entry of a shard, checked but not decoded."""

    key: str
    shard: str
    problem: str
    solution: str
    """Reference answer, e.g. `<answer>7</answer>`; several tags are several reference answers (VizWiz: ten)."""
    process: str
    """Reasoning for supervised training, e.g. `<think>..</think>`; may be empty."""
    problem_type: str
    """Chooses the accuracy rule with reward.accuracy = by_type, e.g. `multiple choice`; may be empty."""
    images: tuple[bytes, ...]
    """Encoded image files, in the order of the question."""
    target_boxes: tuple[Box, ...]
    """In the first image; empty where nothing is annotated."""
    videos: tuple[bytes | FramePictures, ...] = ()
    """Encoded video files or pictures, shown after the images."""
    target_frames: tuple[TargetFrames, ...] = ()
    """In the first video; empty where nothing is annotated."""
    category: str = ""
    """What an evaluation reports it under, e.g. a task of a benchmark; empty: problem_type."""
    question_group: str = ""
    """Questions of one group count as one that is right where all are (MME: the two of a picture); may be empty."""

    @property
    def identity(self) -> str:
        """Shard name and key: keys need only be unique inside a shard."""
        return f"{PurePath(self.shard).name}/{self.key}"


@dataclass(frozen=True)
class Prompt:
    """A sample as the model sees it."""

    sample: Sample
    input_ids: Tensor
    """[P] int64, visual tokens expanded."""
    position_ids: Tensor
    """[3, P] int64."""
    next_position: int
    """Rotary position of the first response token."""
    pixel_values: Tensor
    """[patches, channels * temporal * patch * patch] float32 of the images and videos in the order of their tokens; 0
    rows for text only."""
    grid_thw: Tensor
    """[V, 3] int64 patches of each image and video."""
    is_video: Tensor
    """[V] bool."""
    seconds_per_grid: Tensor
    """[V] float32: seconds of one temporal patch; 0 for images."""
    visual_mask: Tensor
    """[P] bool, True at visual tokens (of images and videos)."""
    target_mask: Tensor
    """[P] bool, True at visual tokens of the first image in a target box, and of the first video in its target frames."""
    response_ids: Tensor
    """[R] int64: the reference response, end-of-turn token included (supervised training)."""


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
        return tuple(prompt.sample.identity for prompt in self.prompts)

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
    """[B, G, R] int64, padded on the right."""
    response_lengths: Tensor
    """[B, G] int64, end-of-turn token included."""
    rollout_logprobs: Tensor
    """[B, G, R] float32 under the sampler (at its temperature, before top-p); a check, never used as old_logprobs."""
    finished: Tensor
    """[B, G] bool: ended with the end-of-turn token rather than at the length limit."""


@dataclass(frozen=True)
class Score:
    """Rewards of a ResponseBatch."""

    rewards: Tensor
    """[B, G] float32."""
    components: Mapping[str, Tensor]
    """Name -> [B, G] float32 before weighting (accuracy, format, ...), and `unparsed` and `error`, 0 or 1."""
    texts: tuple[tuple[str, ...], ...]
    """Decoded responses [B][G]."""
    problems: tuple[tuple[tuple[str, ...], ...], ...] = ()
    """What went wrong in scoring [B][G], each as `kind: detail`."""


@dataclass(frozen=True)
class GroupBatch:
    """B prompt groups in the layout [prompt | response 1 | ... | response G]: what one forward pass reads."""

    prompts: PromptBatch
    response_ids: Tensor
    """[B, G, R] int64."""
    response_lengths: Tensor
    """[B, G] int64."""
    visual_embeds: Optional[tuple[Tensor, ...]] = None
    """Per prompt [visual tokens, 1 + D, H], as MultimodalStage.encode_visual has them: outputs of a frozen vision tower; None: encode the pixels in the pass."""

    @property
    def response_mask(self) -> Tensor:
        """[B, G, R] bool, True at real response tokens."""
        steps = torch.arange(self.response_ids.shape[2], device=self.response_ids.device)
        return steps < self.response_lengths[..., None]

    @property
    def input_ids(self) -> Tensor:
        """[B, P + G R] int64."""
        return torch.cat([self.prompts.input_ids, self.response_ids.flatten(1)], dim=1)

    @property
    def position_ids(self) -> Tensor:
        """[3, B, P + G R] int64; every response continues from its prompt."""
        B, G, R = self.response_ids.shape
        steps = self.prompts.next_position[:, None, None] + torch.arange(R, device=self.response_ids.device)
        responses = steps.expand(B, G, R).reshape(1, B, G * R).expand(3, -1, -1)
        return torch.cat([self.prompts.position_ids, responses], dim=2)

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class StepTotals:
    """What the losses of one optimizer step are divided by: counts over all its micro-batches and data-parallel ranks,
    of the groups that take part; at least 1, so that a step in which none does is 0 and not 0 / 0."""

    num_tokens: int
    """Response tokens."""
    num_sequences: int
    """Responses."""
    max_response_length: int
    """Limit of the generation, a constant of the run."""


@dataclass(frozen=True)
class TrainBatch:
    """One micro-batch of prompt groups with everything a loss needs. Optional parts exist only where they are used:
    log-probabilities on the last pipeline stage, attention on the stage that owns the layer."""

    groups: GroupBatch
    totals: StepTotals
    advantages: Optional[Tensor] = None
    """[B, G] float32."""
    old_logprobs: Optional[Tensor] = None
    """[B, G, R] float32, from the training engine before the first update; not where on_policy."""
    on_policy: bool = False
    """The policy is still the one that made the rollout: what old_logprobs and target_attention would be is the pass of the
    update itself, without gradient."""
    rollout_logprobs: Optional[Tensor] = None
    """[B, G, R] float32 of the sampler; given where the policy is still its own and the two are to be compared."""
    from_teacher: Optional[Tensor] = None
    """[B] bool, with rollout_logprobs: responses of the teacher, which has its own."""
    ref_logprobs: Optional[Tensor] = None
    """[B, G, R] float32, from the frozen reference."""
    target_attention: Mapping[int, Any] = field(default_factory=dict)
    """Layer -> what the divergence is taken to, as `AttentionTerm.keep` kept it: policies [B, G, R, S] float32, queries
    and keys of another pass, or one row [B, P] for a whole group."""
    attention_advantages: Optional[Tensor] = None
    """[B, G] float32: `advantages`, or in a control the same in another order."""
    group_mask: Optional[Tensor] = None
    """[B] bool: groups that count in losses and totals; None: all of them."""

    teacher_hidden: Optional[Tensor] = None
    """[B, G, R, H of the teacher] what the teacher's LM head reads at the rows that predict the response."""
    teacher_attention: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer of the student -> attention policies [B, G, R, S] float32 of the teacher's layer at its depth."""

    @property
    def loss_mask(self) -> Tensor:
        """[B, G, R] bool, True at the response tokens that count."""
        mask = self.groups.response_mask
        return mask if self.group_mask is None else mask & self.group_mask[:, None, None]
