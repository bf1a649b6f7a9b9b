"""From prompts to scored groups: encode images once, generate, decode, score, advantages."""

from dataclasses import dataclass
from typing import Iterator, Optional, Sequence

import torch
from torch import Tensor

from megatron_ral.config import RunConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.generate import SamplingSettings, generate
from megatron_ral.engine.stage import StageEngine
from megatron_ral.functional.advantages import group_advantages
from megatron_ral.functional.sampling import uniform_stream
from megatron_ral.rewards.score import reward_components, score_group
from megatron_ral.types import GroupBatch, Prompt, ResponseBatch, Score, pad_prompts


@dataclass(frozen=True)
class ScoredGroups:
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


def score_responses(responses: ResponseBatch, processor: PromptProcessor, config: RunConfig) -> Score:
    """Decode and score on every rank alike (strings in, floats out; cheap beside a pass of the model)."""
    components = reward_components(config.reward.require_think)
    weights = {"accuracy": config.reward.accuracy_weight, "format": config.reward.format_weight}
    texts, rewards, values = [], [], []
    for b, prompt in enumerate(responses.prompts.prompts):
        group = [processor.decode(responses.response_ids[b, g, : int(responses.response_lengths[b, g])])
                 for g in range(responses.response_ids.shape[1])]
        scored = score_group(group, prompt.sample.solution, components, weights)
        texts.append(tuple(group))
        rewards.append([reward for reward, _ in scored])
        values.append([parts for _, parts in scored])
    parts = {name: torch.tensor([[entry[name] for entry in row] for row in values]) for name in components}
    return Score(torch.tensor(rewards), parts, tuple(texts))


def sample_responses(engine: StageEngine, prompts: Sequence[Prompt], processor: PromptProcessor,
                     settings: SamplingSettings, batch_size: int,
                     *identity: object) -> Iterator[tuple[ResponseBatch, Optional[tuple[Tensor, ...]]]]:
    """Generate for all prompts, `batch_size` at a time; the caller keeps the engine resident. Yields responses with their
    visual embeddings (first stage only)."""
    for start in range(0, len(prompts), batch_size):
        batch = pad_prompts(prompts[start:start + batch_size], processor.pad_token_id)
        embeds = engine.encode_visual(batch)
        yield generate(engine, batch, embeds, settings, *identity), embeds


def collect_rollout(engine: StageEngine, prompts: Sequence[Prompt], processor: PromptProcessor, config: RunConfig,
                    step: int, micro_batch_size: int) -> list[ScoredGroups]:
    """Rollout of this rank's prompts, cut into micro-batches of one shape.

    Args:
        prompts: this data-parallel rank's prompts of the rollout.
        step: rollout number; part of every random stream.
        micro_batch_size: prompt groups per micro-batch; divides len(prompts).
    """
    settings = SamplingSettings(
        config.rollout.group_size, config.rollout.max_response_length, processor.end_token_id, processor.pad_token_id,
        config.rollout.temperature, config.rollout.top_p)
    with engine.resident():
        sampled = list(sample_responses(engine, prompts, processor, settings, config.rollout.generation_batch_size,
                                        config.seed, step))
    longest = max(responses.response_ids.shape[2] for responses, _ in sampled)
    width = max(len(prompt.input_ids) for prompt in prompts)
    rows = []
    for responses, embeds in sampled:
        score = score_responses(responses, processor, config)
        missing = longest - responses.response_ids.shape[2]
        ids = torch.nn.functional.pad(responses.response_ids, (0, missing), value=processor.pad_token_id)
        logprobs = torch.nn.functional.pad(responses.rollout_logprobs, (0, missing))
        for b in range(len(responses.prompts)):
            rows.append((responses.prompts.prompts[b], ids[b], responses.response_lengths[b], logprobs[b],
                         responses.finished[b], score.rewards[b], {n: v[b] for n, v in score.components.items()},
                         score.texts[b], None if embeds is None else embeds[b]))
    batches = []
    for start in range(0, len(rows), micro_batch_size):
        chosen, ids, lengths, logprobs, finished, rewards, parts, texts, embeds = zip(
            *rows[start:start + micro_batch_size])
        groups = GroupBatch(pad_prompts(chosen, processor.pad_token_id, width), torch.stack(ids), torch.stack(lengths),
                            None if embeds[0] is None else tuple(embeds))
        score = Score(torch.stack(rewards), {n: torch.stack([part[n] for part in parts]) for n in parts[0]}, texts)
        advantages = group_advantages(score.rewards, scale=config.loss.advantage_scale)
        shuffled = config.loss.attention_advantages == "shuffled"
        order = shuffled_order(groups.prompts.identities, advantages.shape[1], config.seed, step) if shuffled else None
        batches.append(ScoredGroups(groups, score, advantages, advantages.gather(1, order) if shuffled else advantages,
                                    torch.stack(logprobs), torch.stack(finished)))
    return batches


def shuffled_order(identities: Sequence[str], group_size: int, *identity: object) -> Tensor:
    """[B, G] int64: a random order of each group's responses that belongs to the prompt, not to the rank."""
    return torch.stack([uniform_stream(group_size, "shuffle", *identity, key).argsort() for key in identities])
