"""Collection of a rollout: sample groups, score them, form advantages, cut them into micro-batches."""

from dataclasses import dataclass, field, replace
from typing import Mapping, Optional, Sequence, cast

import torch
from torch import Tensor

from megatron_ral.attention.exploration import ExplorationSettings
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.engine.pipelined_decoder import PromptResponses
from megatron_ral.engine.stage import StageEngine
from megatron_ral.engine.teacher import TeacherEngine
from megatron_ral.functional.advantages import group_advantages
from megatron_ral.functional.sampling import uniform_stream
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.rollout.lengths import MicroBatchSettings, cut_into_micro_batches, longest_first
from megatron_ral.rollout.refill import DrawPrompts, ScoredGroups, refill
from megatron_ral.rollout.resample import Resampling, resample
from megatron_ral.rollout.sampler import Background, Sampler
from megatron_ral.rollout.scoring import answer_tokens, score_responses
from megatron_ral.rollout.settings import RolloutSettings
from megatron_ral.rollout.views import sample_views
from megatron_ral.types import GroupBatch, Prompt, Score, pad_prompts


@dataclass(frozen=True)
class RolloutBatch:
    """One micro-batch of a rollout: scored groups."""

    groups: GroupBatch
    score: Score
    advantages: Tensor
    """[B, G] float32."""
    attention_advantages: Tensor
    """Weights of the responses in the attention term, [B, G] float32: advantages, or what the target makes of them and
    of the accuracy, in a control in another order (see loss.attention_advantages)."""
    rollout_logprobs: Tensor
    """Log-probabilities under the sampler, [B, G, R] float32."""
    finished: Tensor
    """Mask of the responses that ended by themselves, [B, G] bool."""
    from_teacher: Tensor
    """Mask of the groups whose responses are the teacher's, [B] bool."""
    explored_attention: Mapping[int, Tensor] = field(default_factory=dict)
    """Recorded layer -> attention rows that decoding saw, see ResponseBatch.attention."""


@dataclass(frozen=True)
class ScoredRollout:
    """Result of the sampling for a step, before it is cut into micro-batches."""

    groups: ScoredGroups
    """Groups to train on."""
    sampled_rewards: Tensor
    """Rewards of all groups, also of those that were replaced by other prompts, [groups, G] float32."""
    resampling: Resampling = field(default_factory=Resampling)
    """Count of the groups that were sampled again with more noise."""


@dataclass(frozen=True)
class Rollout:
    """Rollout of a step."""

    batches: list[RolloutBatch]
    """Micro-batches to train on."""
    versions: list[int]
    """Optimizer updates behind the weights that sampled each group of the policy's responses, in no order."""
    sampled_rewards: Tensor
    """See `ScoredRollout`."""
    resampling: Resampling = field(default_factory=Resampling)
    """See `ScoredRollout`."""


def collect_rollout(
    engine: StageEngine,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    processor: PromptProcessor,
    settings: RolloutSettings,
    step: int,
    micro_batches: MicroBatchSettings,
    teacher: Optional[TeacherEngine] = None,
    draw: Optional[DrawPrompts] = None,
) -> Rollout:
    """Sample and score this rank's prompts, and cut them into micro-batches.

    Args:
        engine: Policy.
        sampler: Source of its responses.
        prompts: Prompts of this data-parallel rank.
        processor: Decoder of token ids.
        settings: Settings of the rollout.
        step: Rollout number, part of every random stream.
        micro_batches: Size of a micro-batch.
        teacher: Model that answers the share `teacher_rollouts` of the prompts.
        draw: Source of the prompts that replace groups without signal. None: no group is replaced.
    """
    scored = sample_rollout(engine, sampler, prompts, processor, settings, step, teacher, draw)
    return cut_rollout(scored, processor, settings, step, micro_batches, engine.process_groups)


def begin_rollout(
    engine: StageEngine,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    processor: PromptProcessor,
    settings: RolloutSettings,
    step: int,
    teacher: Optional[TeacherEngine] = None,
) -> Optional[Background]:
    """Start to sample what `sample_rollout` then waits for. Arguments are as there.

    Returns:
        The sampling under way. None: the sampler cannot work while the policy is trained, and nothing was started.
    """
    asked = _asks_teacher(prompts, settings, step)
    own = [prompts[index] for index in _by_length(prompts) if not asked[index]]
    sampling = _sampling_settings(engine, processor, settings, step, teacher)
    return sampler.begin(own, sampling, settings.generation_batch_size, settings.seed, step)


def sample_rollout(
    engine: StageEngine,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    processor: PromptProcessor,
    settings: RolloutSettings,
    step: int,
    teacher: Optional[TeacherEngine] = None,
    draw: Optional[DrawPrompts] = None,
) -> ScoredRollout:
    """Sample and score this rank's prompts, and replace groups without signal. Arguments: `collect_rollout`."""
    resampling = Resampling()

    def attempt(prompts: Sequence[Prompt], number: int) -> ScoredGroups:
        return _answer(engine, sampler, prompts, processor, settings, step, teacher, number)

    def answer(prompts: Sequence[Prompt]) -> ScoredGroups:
        return resample(attempt(prompts, 0), attempt, settings.num_resamplings, resampling)

    with engine.resident():
        groups = answer(prompts)
        scores = [groups.score]
        if draw is not None:
            groups, replaced = refill(groups, answer, draw, settings.refill_rounds, engine.process_groups)
            scores += replaced
    return ScoredRollout(groups, torch.cat([score.rewards for score in scores]), resampling)


def cut_rollout(
    scored: ScoredRollout,
    processor: PromptProcessor,
    settings: RolloutSettings,
    step: int,
    micro_batches: MicroBatchSettings,
    process_groups: ProcessGroups,
) -> Rollout:
    """Cut a rollout into micro-batches. Arguments are those of `collect_rollout`. All ranks make the same call."""
    groups = scored.groups
    parts = cut_into_micro_batches(
        [
            len(prompt.input_ids) + int(row.response_lengths.sum())
            for prompt, row in zip(groups.prompts, groups.responses)
        ],
        len(groups.prompts) // settings.num_minibatches,
        micro_batches,
        process_groups,
    )
    batches = [_micro_batch(groups.select(part), processor, settings, step) for part in parts]
    own = [version for version, taught in zip(groups.versions, groups.from_teacher) if not taught]
    return Rollout(batches, own, scored.sampled_rewards, scored.resampling)


def _micro_batch(
    groups: ScoredGroups, processor: PromptProcessor, settings: RolloutSettings, step: int
) -> RolloutBatch:
    """Return some groups as one micro-batch, with the advantages of both terms."""
    pad_token_id, score, embeds = processor.pad_token_id, groups.score, groups.visual_embeds
    responses = PromptResponses.join(pad_prompts(groups.prompts, pad_token_id), groups.responses, pad_token_id)
    batch = GroupBatch(
        responses.prompts,
        responses.response_ids,
        responses.response_lengths,
        None if embeds[0] is None else cast(tuple[Tensor, ...], tuple(embeds)),
        answer_tokens(responses, score.texts, processor),
    )
    advantages = group_advantages(score.rewards, scale=settings.advantage_scale)
    attention_advantages = settings.target.response_weights(advantages, score.rewards, score.components["accuracy"])
    if settings.shuffles_attention_advantages:
        shuffle = shuffled_order(batch.prompts.identities, advantages.shape[1], settings.seed, step)
        attention_advantages = attention_advantages.gather(1, shuffle)
    return RolloutBatch(
        batch,
        score,
        advantages,
        attention_advantages,
        responses.rollout_logprobs,
        responses.finished,
        torch.tensor(groups.from_teacher),
        responses.attention,
    )


def _answer(
    engine: StageEngine,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    processor: PromptProcessor,
    settings: RolloutSettings,
    step: int,
    teacher: Optional[TeacherEngine],
    attempt: int,
) -> ScoredGroups:
    """Sample and score groups of responses to one prompt or more.

    The engine must be resident, and all ranks of a model copy make the same call.

    Args:
        attempt: How often the prompts were sampled before in this rollout. Every attempt has draws of its own.
    """
    pad_token_id, asked = processor.pad_token_id, _asks_teacher(prompts, settings, step)
    rows, embeds, versions = _responses(engine, sampler, prompts, asked, processor, settings, step, teacher, attempt)
    texts_only = [replace(row, attention={}) for row in rows]
    everything = PromptResponses.join(pad_prompts(prompts, pad_token_id), texts_only, pad_token_id)
    score = score_responses(everything, processor, settings.reward, engine, settings.reward_time_limit)
    return ScoredGroups(list(prompts), rows, embeds, asked, versions, score)


def _asks_teacher(prompts: Sequence[Prompt], settings: RolloutSettings, step: int) -> list[bool]:
    """Return for each prompt whether the teacher answers it."""
    share = settings.teacher_rollouts
    return [
        share > 0 and float(uniform_stream(1, "teacher", settings.seed, step, prompt.sample.identity)) < share
        for prompt in prompts
    ]


def _by_length(prompts: Sequence[Prompt]) -> list[int]:
    """Return the order in which prompts are sampled."""
    return longest_first([len(prompt.input_ids) for prompt in prompts], len(prompts))


def _sampling_settings(
    engine: StageEngine,
    processor: PromptProcessor,
    settings: RolloutSettings,
    step: int,
    teacher: Optional[TeacherEngine],
    attempt: int = 0,
) -> SamplingSettings:
    """Return the settings of the draws of a rollout."""
    return SamplingSettings(
        settings.group_size,
        settings.max_response_length,
        processor.end_token_id,
        processor.pad_token_id,
        settings.temperature,
        settings.top_p,
        min(engine.shape.vocab_size, teacher.shape.vocab_size) if teacher is not None else 0,
        settings.exploration(engine.shape, step, attempt),
        settings.cache_tokens,
    )


def _responses(
    engine: StageEngine,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    asked: Sequence[bool],
    processor: PromptProcessor,
    settings: RolloutSettings,
    step: int,
    teacher: Optional[TeacherEngine],
    attempt: int,
) -> tuple[list[PromptResponses], list[Optional[Tensor]], list[int]]:
    """Return for each prompt the responses (by the teacher where `asked`), the policy's visual embeddings and the
    version of the weights that sampled."""
    sampling = _sampling_settings(engine, processor, settings, step, teacher, attempt)
    size, identity = settings.generation_batch_size, (settings.seed, step, *(("attempt", attempt) if attempt else ()))
    rows: dict[int, PromptResponses] = {}
    embeds: dict[int, Optional[Tensor]] = {}
    versions: dict[int, int] = {}
    by_length = _by_length(prompts)
    numbers = {answerer: [index for index in by_length if asked[index] == answerer] for answerer in (False, True)}

    def add_embeds(chosen: list[int], features: Optional[tuple[Tensor, ...]]) -> None:
        embeds.update(zip(chosen, features if features is not None else [None] * len(chosen)))

    def encode(chosen: list[int]) -> None:
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            add_embeds(part, sampler.encode_visual([prompts[index] for index in part], processor.pad_token_id))

    with engine.resident():
        own, done = numbers[False], 0
        if settings.views is not None:
            layers = frozenset(engine.local_layers(sorted(engine.shape.layer_indices(settings.recorded_layers))))
            answered = [prompts[index] for index in own]
            rows.update(zip(own, sample_views(sampler, answered, sampling, settings.views, layers, size, *identity)))
            encode(own)
        else:
            for batch in sampler.sample([prompts[index] for index in own], sampling, size, *identity):
                chosen = own[done : done + len(batch.responses.prompts)]
                rows.update(zip(chosen, PromptResponses.split(batch.responses)))
                add_embeds(chosen, batch.visual_embeds)
                versions.update(zip(chosen, batch.versions))
                done += len(chosen)
        encode(numbers[True])
    # All ranks call a teacher together, but not all of them have prompts to sample again, and none of those is for it.
    if teacher is not None and settings.teacher_rollouts > 0 and not attempt:
        plain = replace(sampling, exploration=ExplorationSettings())
        answers = teacher.answer([prompts[index] for index in numbers[True]], plain, size, *identity)
        rows.update(zip(numbers[True], answers))
    order = range(len(prompts))
    return [rows[i] for i in order], [embeds[i] for i in order], [versions.get(i, -1) for i in order]


def shuffled_order(identities: Sequence[str], group_size: int, *identity: object) -> Tensor:
    """Return a random order of each group's responses, [B, G] int64. It depends on the prompt, not on the rank."""
    return torch.stack([uniform_stream(group_size, "shuffle", *identity, key).argsort() for key in identities])
