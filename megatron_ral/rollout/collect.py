"""From prompts to scored groups: encode images once, generate, score, advantages."""

from dataclasses import dataclass
from typing import Optional, Sequence

import torch
from torch import Tensor

from megatron_ral.config import RunConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.pipelined_decoder import PromptResponses, SamplingSettings, sample_responses
from megatron_ral.engine.stage import StageEngine
from megatron_ral.engine.teacher import TeacherEngine
from megatron_ral.functional.advantages import group_advantages
from megatron_ral.functional.sampling import uniform_stream
from megatron_ral.rollout.lengths import longest_first
from megatron_ral.rollout.scoring import score_responses
from megatron_ral.types import GroupBatch, Prompt, Score, pad_prompts


@dataclass(frozen=True)
class RolloutBatch:
    """One micro-batch of a rollout."""

    groups: GroupBatch
    score: Score
    advantages: Tensor
    """[B, G]"""
    attention_advantages: Tensor
    """[B, G]: what the attention term gets, see loss.attention_advantages."""
    rollout_logprobs: Tensor
    """[B, G, R]"""
    finished: Tensor
    """[B, G] bool"""
    from_teacher: Tensor
    """[B] bool: the teacher's responses, not the policy's."""


def collect_rollout(
    engine: StageEngine,
    prompts: Sequence[Prompt],
    processor: PromptProcessor,
    config: RunConfig,
    step: int,
    micro_batch_size: int,
    teacher: Optional[TeacherEngine] = None,
) -> list[RolloutBatch]:
    """Rollout of this rank's prompts, cut into micro-batches of like lengths, each as wide as its longest (`longest_first`).

    Args:
        prompts: this data-parallel rank's prompts of the rollout.
        step: rollout number; part of every random stream.
        micro_batch_size: prompt groups per micro-batch; divides the prompts of one optimizer step.
        teacher: answers the share distill.teacher_rollouts of the prompts.
    """
    share = config.distill.teacher_rollouts if teacher is not None else 0.0
    asked = [
        share > 0 and float(uniform_stream(1, "teacher", config.seed, step, prompt.sample.identity)) < share
        for prompt in prompts
    ]
    rows, embeds = _answers(engine, prompts, asked, processor, config, step, teacher)
    order = longest_first(
        [
            len(prompt.input_ids) + row.response_lengths.numel() * int(row.response_lengths.max())
            for prompt, row in zip(prompts, rows)
        ],
        len(prompts) // config.rollout.num_minibatches,
    )
    prompts, rows, embeds, asked = ([values[index] for index in order] for values in (prompts, rows, embeds, asked))
    pad_token_id = processor.pad_token_id
    everything = PromptResponses.join(pad_prompts(prompts, pad_token_id), rows, pad_token_id)
    score = score_responses(everything, processor, config.reward, engine)
    batches = []
    for start in range(0, len(prompts), micro_batch_size):
        part = slice(start, start + micro_batch_size)
        own = embeds[part]
        responses = PromptResponses.join(pad_prompts(prompts[part], pad_token_id), rows[part], pad_token_id)
        groups = GroupBatch(
            responses.prompts,
            responses.response_ids,
            responses.response_lengths,
            None if own[0] is None else tuple(own),
        )
        scored = Score(
            score.rewards[part],
            {name: values[part] for name, values in score.components.items()},
            score.texts[part],
            score.problems[part],
        )
        advantages = group_advantages(scored.rewards, scale=config.loss.advantage_scale)
        shuffled = config.loss.attention_advantages == "shuffled"
        order = shuffled_order(groups.prompts.identities, advantages.shape[1], config.seed, step) if shuffled else None
        batches.append(
            RolloutBatch(
                groups,
                scored,
                advantages,
                advantages.gather(1, order) if shuffled else advantages,
                responses.rollout_logprobs,
                responses.finished,
                torch.tensor(asked[part]),
            )
        )
    return batches


def _answers(
    engine: StageEngine,
    prompts: Sequence[Prompt],
    asked: Sequence[bool],
    processor: PromptProcessor,
    config: RunConfig,
    step: int,
    teacher: Optional[TeacherEngine],
) -> tuple[list[PromptResponses], list[Optional[Tensor]]]:
    """Responses to each prompt, by the teacher where `asked`, and the policy's visual embeddings of each (first stage)."""
    settings = SamplingSettings(
        config.rollout.group_size,
        config.rollout.max_response_length,
        processor.end_token_id,
        processor.pad_token_id,
        config.rollout.temperature,
        config.rollout.top_p,
        min(engine.shape.vocab_size, teacher.shape.vocab_size) if teacher is not None else 0,
    )
    size, identity = config.rollout.generation_batch_size, (config.seed, step)
    rows: dict[int, PromptResponses] = {}
    embeds: dict[int, Optional[Tensor]] = {}
    by_length = longest_first([len(prompt.input_ids) for prompt in prompts], len(prompts))
    numbers = {by_teacher: [index for index in by_length if asked[index] == by_teacher] for by_teacher in (False, True)}

    def see(start: list[int], features: Optional[tuple[Tensor, ...]]) -> None:
        embeds.update(zip(start, features if features is not None else [None] * len(start)))

    with engine.resident():
        own, done = numbers[False], 0
        for responses, features in sample_responses(
            engine, [prompts[index] for index in own], settings, size, *identity
        ):
            chosen = own[done : done + len(responses.prompts)]
            rows.update(zip(chosen, PromptResponses.split(responses)))
            see(chosen, features)
            done += len(chosen)
        for start in range(0, len(numbers[True]), size):
            chosen = numbers[True][start : start + size]
            see(chosen, engine.encode_visual(pad_prompts([prompts[index] for index in chosen], settings.pad_token_id)))
    if teacher is not None and config.distill.teacher_rollouts > 0:
        answers = teacher.answer([prompts[index] for index in numbers[True]], settings, size, *identity)
        rows.update(zip(numbers[True], answers))
    return [rows[index] for index in range(len(prompts))], [embeds[index] for index in range(len(prompts))]


def shuffled_order(identities: Sequence[str], group_size: int, *identity: object) -> Tensor:
    """[B, G] int64: a random order of each group's responses that belongs to the prompt, not to the rank."""
    return torch.stack([uniform_stream(group_size, "shuffle", *identity, key).argsort() for key in identities])
