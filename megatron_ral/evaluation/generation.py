"""Generation for evaluations and probes: greedy responses together with reduced attention rows."""

from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.config import RunConfig
from megatron_ral.config.sections import RewardConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.engine.pipelined_decoder import sample_responses
from megatron_ral.engine.stage import StageEngine
from megatron_ral.rollout.scoring import answer_tokens, decode_responses
from megatron_ral.types import GroupBatch, Prompt, ResponseBatch


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of generation and scoring in an evaluation."""

    max_response_length: int
    """Number of tokens after which a response is cut off."""
    generation_batch_size: int
    """Number of prompts that are generated together; it does not change the responses."""
    cache_tokens: int
    """Largest number of tokens in the KV cache of one batch; 0 for no limit."""
    temperature: float
    """Temperature of sampled responses."""
    top_p: float
    """Probability mass of the most likely tokens that sampled responses are drawn from."""
    seed: int
    """Seed of sampled responses."""
    reward: RewardConfig
    """Parts of the reward and their weights."""
    reward_time_limit: float
    """Seconds that one call of a reward function of the user may take."""

    @classmethod
    def from_config(cls, config: RunConfig) -> "EvaluationSettings":
        """Return the settings of a run's configuration."""
        return cls(
            max_response_length=config.rollout.max_response_length,
            generation_batch_size=config.rollout.generation_batch_size,
            cache_tokens=config.rollout.cache_tokens,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            seed=config.seed,
            reward=config.reward,
            reward_time_limit=config.watchdog.reward_time_limit,
        )


def greedy_batches(
    engine: StageEngine,
    prompts: Iterable[Prompt],
    processor: PromptProcessor,
    settings: EvaluationSettings,
    layers: Sequence[int],
    reduce_rows: Callable[[AttentionRows, GroupBatch], Any],
) -> Iterator[tuple[ResponseBatch, GroupBatch, Mapping[int, Any]]]:
    """Yield greedy responses batch by batch, with their attention rows reduced per layer. No gradient.

    The engine must be resident. Every rank of the model calls this with the same prompts.

    Args:
        engine: Model that generates and reads the responses.
        prompts: Prompts of this data-parallel rank.
        processor: Source of the end-of-turn and padding tokens.
        settings: Length and batch size of the generation.
        layers: 0-based layers whose rows are recorded.
        reduce_rows: Function of a layer's recorded rows and the batch they belong to.

    Yields:
        The responses, the same as prompt groups of one response, and the result of `reduce_rows` by layer for those of
        `layers` that live on this pipeline stage.
    """
    sampling = SamplingSettings(
        1,
        settings.max_response_length,
        processor.end_token_id,
        processor.pad_token_id,
        temperature=0.0,
        cache_tokens=settings.cache_tokens,
    )
    for responses, embeds in sample_responses(engine, prompts, sampling, settings.generation_batch_size):
        groups = GroupBatch(
            responses.prompts,
            responses.response_ids,
            responses.response_lengths,
            embeds,
            answer_tokens(responses, decode_responses(responses, processor), processor),
        )
        yield responses, groups, engine.forward([groups], layers, store=reduce_rows)[0].attention
