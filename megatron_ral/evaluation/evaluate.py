"""Held-out evaluation: accuracy, format and target attention of greedy responses; rewards of sampled responses."""

from dataclasses import dataclass
from typing import Callable, Iterable, Mapping

from torch import Tensor

from megatron_ral.attention.deciding import row_sums
from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.attention.mass import RowMass, row_masses
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.engine.pipelined_decoder import sample_responses
from megatron_ral.engine.stage import StageEngine
from megatron_ral.evaluation.generation import EvaluationSettings, greedy_batches
from megatron_ral.parallel.collectives import sum_metrics
from megatron_ral.rewards.score import ERROR, UNPARSED
from megatron_ral.rollout.scoring import ScoringIssueLog, score_responses, scoring_issues
from megatron_ral.types import GroupBatch, Prompt, PromptBatch, ResponseBatch, Score

LayerShares = tuple[float | None, ...]
"""Share in every layer; None for a layer with linear attention, which has no attention distribution."""


@dataclass(frozen=True)
class Evaluation:
    """Results over all data-parallel ranks. Rates and attention masses lie in [0, 1]."""

    accuracy: float
    """Mean accuracy over prompts."""
    format_rate: float
    """Share of responses in the required format."""
    unparsed_rate: float
    """Share of responses without exactly one answer tag. They count as wrong too."""
    error_rate: float
    """Share of responses for which a part of the reward failed."""
    target_attention: float
    """Attention mass on the target's visual tokens / mass on all visual tokens in the measured layer, mean over the
    response rows of annotated samples."""
    target_attention_by_layer: LayerShares
    """`target_attention` of every layer."""
    target_deciding_by_layer: LayerShares
    """Same share at deciding rows alone: those that predict the first token of the answer (`attention/deciding.py`)."""
    target_peak_by_layer: LayerShares
    """Largest such share among the rows of a response, mean over responses."""
    target_chance: float
    """Share of the visual tokens that are the target's, mean over annotated samples: that of attention without aim."""
    visual_mass: float
    """Attention mass on all visual tokens in the measured layer, mean over response rows."""
    num_prompts: int
    """Number of prompts evaluated."""


def evaluate_prompts(
    engine: StageEngine,
    prompts: Iterable[Prompt],
    processor: PromptProcessor,
    settings: EvaluationSettings,
    layer: int,
    progress: Callable[[int], object] = lambda count: None,
    collect: Callable[[ResponseBatch, Score], None] = lambda responses, score: None,
) -> Evaluation:
    """Answer this rank's prompts greedily and return the results over all ranks, the same on every rank.

    Args:
        engine: Policy or frozen model.
        prompts: Share of this data-parallel rank. It may be an iterator that decodes while it is read.
        processor: Tokenizer for the texts of the responses.
        settings: Generation and reward.
        layer: 0-based layer that is reported as the measured one.
        progress: Function called with the number of prompts done after each batch.
        collect: Function called with each batch of responses and its score.
    """
    sums: dict[str, float] = {}
    layers, issues = engine.shape.softmax_layers, ScoringIssueLog()
    with engine.resident():
        for responses, _, attention in greedy_batches(engine, prompts, processor, settings, layers, _attention_sums):
            score = score_responses(responses, processor, settings.reward, engine, settings.reward_time_limit)
            if engine.layout.is_last_stage:
                counts = {name: score.components[name].sum() for name in ("accuracy", "format", UNPARSED, ERROR)}
                _add(sums, {"prompts": len(score.rewards), **counts, **_chance_sums(responses.prompts)})
                if engine.layout.tensor_rank == 0:
                    issues.write(scoring_issues(score, responses.prompts.prompts, unparsed=False))
            for index, values in attention.items():
                _add(sums, {f"{name}/{index}": value for name, value in values.items()})
            collect(responses, score)
            progress(len(responses.prompts))
    total = sum_metrics(sums, engine.process_groups)

    def mean(name: str, count: str) -> float:
        return total.get(name, 0.0) / max(total.get(count, 0.0), 1.0)

    def by_layer(name: str) -> LayerShares:
        return tuple(
            mean(f"{name}/{index}", f"{name}_count/{index}") if index in layers else None
            for index in range(engine.shape.num_layers)
        )

    return Evaluation(
        accuracy=mean("accuracy", "prompts"),
        format_rate=mean("format", "prompts"),
        unparsed_rate=mean(UNPARSED, "prompts"),
        error_rate=mean(ERROR, "prompts"),
        target_attention=mean(f"target_mass/{layer}", f"target_mass_count/{layer}"),
        target_attention_by_layer=by_layer("target_mass"),
        target_deciding_by_layer=by_layer("target_deciding"),
        target_peak_by_layer=by_layer("target_peak"),
        target_chance=mean("chance", "annotated"),
        visual_mass=mean(f"visual/{layer}", f"rows/{layer}"),
        num_prompts=int(total.get("prompts", 0)),
    )


def sample_prompts(
    engine: StageEngine,
    prompts: Iterable[Prompt],
    processor: PromptProcessor,
    settings: EvaluationSettings,
    num_samples: int,
    collect: Callable[[ResponseBatch, Score], None],
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Sample `num_samples` responses to each of this rank's prompts and pass them with their scores to `collect`.

    The responses to a prompt depend on `settings.seed` and the identity of the prompt alone, not on the other prompts
    or the number of ranks.

    Args:
        engine: Policy or frozen model.
        prompts: Share of this data-parallel rank.
        processor: Tokenizer for the texts of the responses.
        settings: Generation and reward.
        num_samples: Number of responses per prompt.
        collect: Function called with each batch of responses and its score.
        progress: Function called with the number of prompts done after each batch.
    """
    sampling = SamplingSettings(
        num_samples,
        settings.max_response_length,
        processor.end_token_id,
        processor.pad_token_id,
        settings.temperature,
        settings.top_p,
        cache_tokens=settings.cache_tokens,
    )
    with engine.resident():
        for responses, _ in sample_responses(
            engine, prompts, sampling, settings.generation_batch_size, "evaluation", settings.seed
        ):
            collect(
                responses, score_responses(responses, processor, settings.reward, engine, settings.reward_time_limit)
            )
            progress(len(responses.prompts))


def _attention_sums(rows: AttentionRows, groups: GroupBatch) -> dict[str, Tensor]:
    """Return sums over response rows: their number, their mass on visual tokens, and the shares on the target."""
    prompts, mask = groups.prompts, groups.response_mask
    masses = row_masses(rows.attention, rows.keys(), prompts.visual_mask, prompts.target_mask)
    totals, count, shares = row_sums(masses, groups, mask)
    sums = {"rows": count, "visual": RowMass(*totals).visual}
    for name, (total, count) in shares.named().items():
        sums |= {name: total, f"{name}_count": count}
    return sums


def _chance_sums(prompts: PromptBatch) -> dict[str, Tensor]:
    """Return the number of annotated prompts, and the sum of the shares of their visual tokens that are the target."""
    share = prompts.target_mask.sum(dim=-1) / prompts.visual_mask.sum(dim=-1).clamp(min=1)
    return {"annotated": prompts.is_annotated.sum(), "chance": share.sum()}


def _add(sums: dict[str, float], values: Mapping[str, Tensor | float]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + float(value)
