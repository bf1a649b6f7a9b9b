"""Held-out evaluation: greedy responses, accuracy, format, and how much of the visual attention meets the target."""

import itertools
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence

import torch
from torch import Tensor

from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.attention.mass import row_mass
from megatron_ral.config import RunConfig
from megatron_ral.data.issues import SampleError
from megatron_ral.data.loader import Source
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.data.shards import parse_sample, shard_entries
from megatron_ral.engine.pipelined_decoder import SamplingSettings, sample_responses
from megatron_ral.engine.stage import StageEngine
from megatron_ral.engine.teacher import TeacherEngine
from megatron_ral.parallel.collectives import broadcast_from_stage_, gather_objects, sum_metrics
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.rewards.score import ERROR, UNPARSED
from megatron_ral.rollout.scoring import (
    ScoringIssueLog,
    decode_responses,
    score_responses,
    scoring_issues,
    unused_rules,
)
from megatron_ral.types import GroupBatch, Prompt, ResponseBatch, Score

logger = logging.getLogger(__name__)

NUM_LOOKED_AT = 64


@dataclass(frozen=True)
class Evaluation:
    """Results over all data-parallel ranks."""

    accuracy: float
    format_rate: float
    unparsed_rate: float
    """Responses without exactly one answer tag; wrong, and counted apart."""
    error_rate: float
    """Responses that a part of the reward failed on."""
    target_attention: float
    """Attention mass of response rows on the asked cell's visual tokens / mass on all visual tokens, mean over rows,
    in the measured layer."""
    target_attention_by_layer: tuple[float, ...]
    visual_mass: float
    """Attention mass of response rows on all visual tokens, mean over rows."""
    num_prompts: int


@dataclass(frozen=True)
class ProbeView:
    """One probe prompt with its greedy response and where the response rows looked."""

    prompt: Prompt
    text: str
    visual_attention: Tensor
    """[visual tokens] float32: policy mass averaged over response rows."""
    teacher_attention: Optional[Tensor] = None
    """The same of the teacher's layer at that depth, reading the same response."""


@dataclass(frozen=True)
class TokenViews:
    """One prompt, its greedy response with what that was worth, and where the row of every token looked."""

    prompt: Prompt
    token_ids: Tensor
    """[R] int64, end-of-turn token included."""
    text: str
    reward: float
    components: Mapping[str, float]
    visual_attention: Mapping[int, Tensor]
    """Layer -> [R, visual tokens] float32: policy mass of each response row."""


class PromptSet:
    """Of the first `limit` samples of the shards in file order every dp_size-th, starting at dp_rank: the whole set does not
    depend on the number of ranks. Pictures and videos are decoded when a prompt is reached, anew in each pass, so that a
    benchmark never lies decoded in memory. Unusable samples are left out with a warning and counted; what may be wrong on
    one rank alone (its disk, its memory) is an error where `num_readers` ranks read the same samples."""

    def __init__(
        self,
        shards: Sequence[str],
        processor: PromptProcessor,
        limit: int,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        num_readers: int = 1,
    ):
        self.shards, self.processor, self.limit, self.num_readers = shards, processor, limit, num_readers
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.left_out: dict[tuple[str, str], str] = {}
        """(shard, key) -> one of faults.REASONS, as far as the set was read."""

    def __iter__(self) -> Iterator[Prompt]:
        for index, entry in enumerate(itertools.islice(shard_entries(self.shards, self.num_readers), self.limit)):
            if index % self.dp_size == self.dp_rank:
                try:
                    prompt = self.processor(parse_sample(entry))
                except Exception as error:  # decoders of foreign bytes may raise anything
                    if isinstance(error, MemoryError) and self.num_readers > 1:
                        raise
                    place = (entry["__url__"], entry["__key__"])
                    if place not in self.left_out:
                        logger.warning("left out of the evaluation: %s", error)
                    self.left_out[place] = error.reason if isinstance(error, SampleError) else "unusable"
                else:
                    yield prompt

    def size(self, source: Source) -> int:
        """Samples of this rank, as far as headers tell."""
        return len(range(self.dp_rank, min(_readable(source), self.limit), self.dp_size))


def _readable(source: Source) -> int:
    return sum(len(index) - len(index.faults) for index in source.indexes)


def say_what_is_scored(source: Source, config: RunConfig) -> None:
    """Warn where the set is cut by its limit, or answers are matched as text though their types have rules."""
    if (held := _readable(source)) > (limit := config.logging.num_eval_prompts):
        logger.warning(
            "only the first %d of %d samples are evaluated; logging.num_eval_prompts=%d takes all", limit, held, held
        )
    types = []
    for entry in itertools.islice(shard_entries(source.shards), NUM_LOOKED_AT):
        try:
            types.append(parse_sample(entry).problem_type)
        except SampleError:
            continue
    if unused := unused_rules(types, config.reward.accuracy):
        logger.warning(
            "reward.accuracy=exact: answers are matched as text, though problem types of the data have rules of "
            "their own (%s); reward.accuracy=by_type scores by them",
            ", ".join(unused),
        )


def left_out_by_reason(source: Source, prompts: PromptSet, process_groups: ProcessGroups) -> dict[str, int]:
    """Samples that could not be used, over all ranks, by reason; those that headers tell of in the whole source."""
    reasons = Counter(fault.reason for index in source.indexes for fault in index.faults.values())
    reasons["truncated"] += sum(
        bool(index.damage) and "truncated" not in {fault.reason for fault in index.faults.values()}
        for index in source.indexes
    )
    for found in gather_objects(list(prompts.left_out.values()), process_groups.data):
        reasons.update(found)
    return {reason: count for reason, count in reasons.most_common() if count}


def read_prompts(
    shards: Sequence[str],
    processor: PromptProcessor,
    limit: int,
    *,
    dp_rank: int = 0,
    dp_size: int = 1,
    num_readers: int = 1,
) -> list[Prompt]:
    """All prompts of a PromptSet at once."""
    return list(PromptSet(shards, processor, limit, dp_rank=dp_rank, dp_size=dp_size, num_readers=num_readers))


def evaluate_prompts(
    engine: StageEngine,
    prompts: Iterable[Prompt],
    processor: PromptProcessor,
    config: RunConfig,
    layer: int,
    progress: Callable[[int], None] = lambda count: None,
    keep: Callable[[ResponseBatch, Score], None] = lambda responses, score: None,
) -> Evaluation:
    """Greedy evaluation of this rank's prompts, reduced over all ranks.

    Args:
        engine: policy or frozen engine.
        prompts: this rank's share; may be decoded while it is read.
        layer: 0-based layer whose attention is reported as the measured one; all layers are reported beside it.
        progress: called with the number of prompts done.
        keep: called with each batch of responses and their score.
    """
    sums: dict[str, float] = {}
    layers, problems = range(engine.shape.num_layers), ScoringIssueLog()
    with engine.resident():
        for responses, _, attention in _greedy_batches(engine, prompts, processor, config, layers, _attention_sums):
            score = score_responses(responses, processor, config.reward, engine)
            if engine.layout.is_last_stage:
                _add(
                    sums,
                    {
                        "prompts": len(score.rewards),
                        **{name: score.components[name].sum() for name in ("accuracy", "format", UNPARSED, ERROR)},
                    },
                )
                if engine.layout.tensor_rank == 0:
                    problems.write(scoring_issues(score, responses.prompts.prompts, unparsed=False))
            for index, values in attention.items():
                _add(sums, {f"{name}/{index}": value for name, value in values.items()})
            keep(responses, score)
            progress(len(responses.prompts))
    total = sum_metrics(sums, engine.process_groups)

    def mean(name: str, count: str) -> float:
        return total.get(name, 0.0) / max(total.get(count, 0.0), 1.0)

    by_layer = tuple(mean(f"target/{index}", f"annotated/{index}") for index in layers)
    return Evaluation(
        accuracy=mean("accuracy", "prompts"),
        format_rate=mean("format", "prompts"),
        unparsed_rate=mean(UNPARSED, "prompts"),
        error_rate=mean(ERROR, "prompts"),
        target_attention=by_layer[layer],
        target_attention_by_layer=by_layer,
        visual_mass=mean(f"visual/{layer}", f"rows/{layer}"),
        num_prompts=int(total.get("prompts", 0)),
    )


def view_probes(
    engine: StageEngine,
    prompts: Sequence[Prompt],
    processor: PromptProcessor,
    config: RunConfig,
    layer: int,
    teacher: Optional[TeacherEngine] = None,
) -> list[ProbeView]:
    """Greedy responses of fixed prompts and the attention of their rows over the image, on every rank; with a teacher also
    where that looks while it reads them."""
    views = []
    owner = engine.layout.stage_of_layer(layer, engine.shape.num_layers)

    def everywhere(rows: Optional[Tensor], groups: GroupBatch) -> Tensor:
        """[B, P] on every stage, from what the layer's owner kept."""
        if rows is None:
            rows = torch.zeros(len(groups), groups.prompts.input_ids.shape[1])
        return broadcast_from_stage_(
            rows.to(engine.process_groups.device).contiguous(), owner, engine.process_groups
        ).cpu()

    with engine.resident():
        for responses, groups, attention in _greedy_batches(engine, prompts, processor, config, [layer], _mean_row):
            batch, masses = responses.prompts, [everywhere(attention.get(layer), groups)]
            if teacher is not None:
                [read] = teacher.read([groups], [layer], store=lambda rows, _: rows.distribution(), hidden_states=False)
                rows = read.attention.get(layer)
                masses.append(everywhere(None if rows is None else _mean_policy(rows, groups), groups))
            texts = decode_responses(responses, processor)
            for b, prompt in enumerate(batch.prompts):
                views.append(ProbeView(prompt, texts[b][0], *(mass[b][batch.visual_mask[b]] for mass in masses)))
    return views


def view_tokens(
    engine: StageEngine, prompts: Iterable[Prompt], processor: PromptProcessor, config: RunConfig, layers: Sequence[int]
) -> Iterator[TokenViews]:
    """Greedy responses and the attention of each of their rows over the image, in one process.

    Args:
        layers: 0-based layers that are looked at.
    """
    assert engine.layout.world_size == 1, "the rows of a layer are on one rank only where there is one"

    def over_prompt(rows: AttentionRows, groups: GroupBatch) -> Tensor:
        return rows.distribution()[:, 0, :, : groups.prompts.input_ids.shape[1]].cpu()

    with engine.resident():
        for responses, _, attention in _greedy_batches(engine, prompts, processor, config, layers, over_prompt):
            score, batch = score_responses(responses, processor, config.reward, engine), responses.prompts
            for b, prompt in enumerate(batch.prompts):
                length = int(responses.response_lengths[b, 0])
                yield TokenViews(
                    prompt,
                    responses.response_ids[b, 0, :length],
                    score.texts[b][0],
                    float(score.rewards[b, 0]),
                    {name: float(values[b, 0]) for name, values in score.components.items()},
                    {layer: rows[b, :length][:, batch.visual_mask[b]] for layer, rows in attention.items()},
                )


def _greedy_batches(
    engine: StageEngine,
    prompts: Iterable[Prompt],
    processor: PromptProcessor,
    config: RunConfig,
    layers: Sequence[int],
    keep: Callable[[AttentionRows, GroupBatch], Any],
) -> Iterator[tuple[ResponseBatch, GroupBatch, Mapping[int, Any]]]:
    """Greedy responses batch by batch, the same as groups of one, and what `keep` makes of the attention rows of those of
    `layers` that live on this stage."""
    settings = SamplingSettings(
        1, config.rollout.max_response_length, processor.end_token_id, processor.pad_token_id, temperature=0.0
    )
    sampled = sample_responses(engine, prompts, settings, config.rollout.generation_batch_size)
    for responses, embeds in sampled:
        groups = GroupBatch(responses.prompts, responses.response_ids, responses.response_lengths, embeds)
        yield responses, groups, engine.forward([groups], layers, store=keep)[0].attention


def _attention_sums(rows: AttentionRows, groups: GroupBatch) -> dict[str, Tensor]:
    prompts, mask = groups.prompts, groups.response_mask
    mass = row_mass(rows.attention, rows.keys(), prompts.visual_mask, prompts.target_mask)
    annotated = mask & prompts.target_mask.any(dim=-1)[:, None, None]
    return {
        "rows": mask.sum(),
        "visual": (mass.visual * mask).sum(),
        "annotated": annotated.sum(),
        "target": (mass.target_share * annotated).sum(),
    }


def _mean_row(rows: AttentionRows, groups: GroupBatch) -> Tensor:
    return _mean_policy(rows.distribution(), groups)


def _mean_policy(policy_BGRS: Tensor, groups: GroupBatch) -> Tensor:
    """[B, P]: attention policy over the prompt, averaged over response rows."""
    mask = groups.response_mask.to(policy_BGRS.device)[..., None]
    return (policy_BGRS[..., : groups.prompts.input_ids.shape[1]] * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2))


def _add(sums: dict[str, float], values: dict) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + float(value)
