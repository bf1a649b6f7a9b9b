"""Collection of a rollout: sample groups, score them, form advantages, cut them into micro-batches."""

from dataclasses import dataclass
from typing import Optional, Sequence, cast

import torch
from torch import Tensor

from megatron_ral.config.sections import RewardConfig, RunConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.engine.pipelined_decoder import PromptResponses
from megatron_ral.engine.stage import StageEngine
from megatron_ral.engine.teacher import TeacherEngine
from megatron_ral.functional.advantages import group_advantages
from megatron_ral.functional.sampling import uniform_stream
from megatron_ral.rollout.lengths import longest_first
from megatron_ral.rollout.sampler import Sampler
from megatron_ral.rollout.scoring import score_responses
from megatron_ral.types import GroupBatch, Prompt, Score, pad_prompts


@dataclass(frozen=True)
class RolloutSettings:
    """Settings of a rollout."""

    seed: int
    group_size: int
    max_response_length: int
    temperature: float
    top_p: float
    generation_batch_size: int
    """Largest number of prompts that are generated together."""
    num_minibatches: int
    """Number of optimizer updates per pass over the rollout."""
    reward: RewardConfig
    advantage_scale: str
    """Scale of `group_advantages`."""
    shuffles_attention_advantages: bool
    """True if the attention term gets the advantages of each group in a random order (a control)."""
    teacher_rollouts: float
    """Share of prompts that the teacher answers, 0 without a teacher."""

    @classmethod
    def from_config(cls, config: RunConfig) -> "RolloutSettings":
        rollout = config.rollout
        return cls(
            seed=config.seed,
            group_size=rollout.group_size,
            max_response_length=rollout.max_response_length,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            generation_batch_size=rollout.generation_batch_size,
            num_minibatches=rollout.num_minibatches,
            reward=config.reward,
            advantage_scale=config.loss.advantage_scale,
            shuffles_attention_advantages=config.loss.attention_advantages == "shuffled",
            teacher_rollouts=config.distill.teacher_rollouts if config.distills else 0.0,
        )


@dataclass(frozen=True)
class RolloutBatch:
    """One micro-batch of a rollout: scored groups."""

    groups: GroupBatch
    score: Score
    advantages: Tensor
    """[B, G] float32."""
    attention_advantages: Tensor
    """Advantages of the attention term, [B, G] float32 (see loss.attention_advantages)."""
    rollout_logprobs: Tensor
    """Log-probabilities under the sampler, [B, G, R] float32."""
    finished: Tensor
    """Mask of the responses that ended by themselves, [B, G] bool."""
    from_teacher: Tensor
    """Mask of the groups whose responses are the teacher's, [B] bool."""


def collect_rollout(
    engine: StageEngine,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    processor: PromptProcessor,
    settings: RolloutSettings,
    step: int,
    micro_batch_size: int,
    teacher: Optional[TeacherEngine] = None,
) -> list[RolloutBatch]:
    """Sample and score this rank's prompts, and cut them into micro-batches of similar lengths (`longest_first`).

    Args:
        engine: Policy.
        sampler: Source of its responses.
        prompts: Prompts of this data-parallel rank.
        processor: Decoder of token ids.
        settings: Settings of the rollout.
        step: Rollout number, part of every random stream.
        micro_batch_size: Prompt groups per micro-batch. It divides the prompts of one optimizer step.
        teacher: Model that answers the share `teacher_rollouts` of the prompts.
    """
    share = settings.teacher_rollouts
    asked = [
        share > 0 and float(uniform_stream(1, "teacher", settings.seed, step, prompt.sample.identity)) < share
        for prompt in prompts
    ]
    rows, embeds = _answers(engine, sampler, prompts, asked, processor, settings, step, teacher)
    order = longest_first(
        [
            len(prompt.input_ids) + row.response_lengths.numel() * int(row.response_lengths.max())
            for prompt, row in zip(prompts, rows)
        ],
        len(prompts) // settings.num_minibatches,
    )
    prompts, rows = [prompts[index] for index in order], [rows[index] for index in order]
    embeds, asked = [embeds[index] for index in order], [asked[index] for index in order]
    pad_token_id = processor.pad_token_id
    everything = PromptResponses.join(pad_prompts(prompts, pad_token_id), rows, pad_token_id)
    score = score_responses(everything, processor, settings.reward, engine)
    batches = []
    for start in range(0, len(prompts), micro_batch_size):
        part = slice(start, start + micro_batch_size)
        own = embeds[part]
        responses = PromptResponses.join(pad_prompts(prompts[part], pad_token_id), rows[part], pad_token_id)
        groups = GroupBatch(
            responses.prompts,
            responses.response_ids,
            responses.response_lengths,
            None if own[0] is None else cast(tuple[Tensor, ...], tuple(own)),
        )
        scored = Score(
            score.rewards[part],
            {name: values[part] for name, values in score.components.items()},
            score.texts[part],
            score.problems[part],
        )
        advantages = attention_advantages = group_advantages(scored.rewards, scale=settings.advantage_scale)
        if settings.shuffles_attention_advantages:
            shuffle = shuffled_order(groups.prompts.identities, advantages.shape[1], settings.seed, step)
            attention_advantages = advantages.gather(1, shuffle)
        batches.append(
            RolloutBatch(
                groups,
                scored,
                advantages,
                attention_advantages,
                responses.rollout_logprobs,
                responses.finished,
                torch.tensor(asked[part]),
            )
        )
    return batches


def _answers(
    engine: StageEngine,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    asked: Sequence[bool],
    processor: PromptProcessor,
    settings: RolloutSettings,
    step: int,
    teacher: Optional[TeacherEngine],
) -> tuple[list[PromptResponses], list[Optional[Tensor]]]:
    """Return the responses to each prompt (by the teacher where `asked`) and the policy's visual embeddings of each."""
    sampling = SamplingSettings(
        settings.group_size,
        settings.max_response_length,
        processor.end_token_id,
        processor.pad_token_id,
        settings.temperature,
        settings.top_p,
        min(engine.shape.vocab_size, teacher.shape.vocab_size) if teacher is not None else 0,
    )
    size, identity = settings.generation_batch_size, (settings.seed, step)
    rows: dict[int, PromptResponses] = {}
    embeds: dict[int, Optional[Tensor]] = {}
    by_length = longest_first([len(prompt.input_ids) for prompt in prompts], len(prompts))
    numbers = {answerer: [index for index in by_length if asked[index] == answerer] for answerer in (False, True)}

    def add_embeds(chosen: list[int], features: Optional[tuple[Tensor, ...]]) -> None:
        embeds.update(zip(chosen, features if features is not None else [None] * len(chosen)))

    with engine.resident():
        own, done = numbers[False], 0
        for batch in sampler.sample([prompts[index] for index in own], sampling, size, *identity):
            chosen = own[done : done + len(batch.responses.prompts)]
            rows.update(zip(chosen, PromptResponses.split(batch.responses)))
            add_embeds(chosen, batch.visual_embeds)
            done += len(chosen)
        for start in range(0, len(numbers[True]), size):
            chosen = numbers[True][start : start + size]
            add_embeds(chosen, sampler.encode_visual([prompts[index] for index in chosen], processor.pad_token_id))
    if teacher is not None and settings.teacher_rollouts > 0:
        answers = teacher.answer([prompts[index] for index in numbers[True]], sampling, size, *identity)
        rows.update(zip(numbers[True], answers))
    return [rows[index] for index in range(len(prompts))], [embeds[index] for index in range(len(prompts))]


def shuffled_order(identities: Sequence[str], group_size: int, *identity: object) -> Tensor:
    """Return a random order of each group's responses, [B, G] int64. It depends on the prompt, not on the rank."""
    return torch.stack([uniform_stream(group_size, "shuffle", *identity, key).argsort() for key in identities])
