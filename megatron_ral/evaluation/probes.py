"""Probes: a few fixed prompts, their greedy responses, and the attention of response rows over the image."""

from dataclasses import dataclass
from typing import Iterable, Iterator, Mapping, Optional, Sequence

import torch
from torch import Tensor

from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.stage import StageEngine
from megatron_ral.engine.teacher import TeacherEngine
from megatron_ral.evaluation.generation import EvaluationSettings, greedy_batches
from megatron_ral.parallel.collectives import broadcast_from_stage_
from megatron_ral.rollout.scoring import decode_responses, score_responses
from megatron_ral.types import GroupBatch, Prompt


@dataclass(frozen=True)
class ProbeView:
    """One probe prompt with its greedy response and the mean attention of the response rows over the image."""

    prompt: Prompt
    text: str
    """Decoded response."""
    visual_attention: Tensor
    """[visual tokens] float32: attention mass on each visual token, mean over response rows."""
    teacher_attention: Optional[Tensor] = None
    """`visual_attention` of the teacher's layer at the same depth while it reads the same response."""


@dataclass(frozen=True)
class TokenViews:
    """One prompt, its scored greedy response, and the attention of each response row over the image."""

    prompt: Prompt
    token_ids: Tensor
    """[R] int64, end-of-turn token included."""
    text: str
    """Decoded response."""
    reward: float
    components: Mapping[str, float]
    """Parts of the reward by name, before weighting."""
    visual_attention: Mapping[int, Tensor]
    """Layer -> [R, visual tokens] float32: attention mass of each response row on each visual token."""


def view_probes(
    engine: StageEngine,
    prompts: Sequence[Prompt],
    processor: PromptProcessor,
    settings: EvaluationSettings,
    layer: int,
    teacher: Optional[TeacherEngine] = None,
) -> list[ProbeView]:
    """Return the greedy responses to fixed prompts and their attention over the image, on every rank. No gradient.

    Args:
        engine: Policy or frozen model.
        prompts: The same prompts on every rank.
        processor: Tokenizer for the texts of the responses.
        settings: Generation.
        layer: 0-based layer whose rows are averaged.
        teacher: Second model whose attention over the same responses is returned too.
    """
    views = []
    owner = engine.layout.stage_of_layer(layer, engine.shape.num_layers)

    def share(rows_BP: Optional[Tensor], groups: GroupBatch) -> Tensor:
        """Return the [B, P] tensor of the stage that owns the layer on every stage."""
        if rows_BP is None:
            rows_BP = torch.zeros(len(groups), groups.prompts.input_ids.shape[1])
        on_device = rows_BP.to(engine.process_groups.device).contiguous()
        return broadcast_from_stage_(on_device, owner, engine.process_groups).cpu()

    with engine.resident():
        for responses, groups, attention in greedy_batches(engine, prompts, processor, settings, [layer], _mean_row):
            batch, masses = responses.prompts, [share(attention.get(layer), groups)]
            if teacher is not None:
                [read] = teacher.read([groups], [layer], store=lambda rows, _: rows.distribution(), hidden_states=False)
                rows = read.attention.get(layer)
                masses.append(share(None if rows is None else _mean_distribution(rows, groups), groups))
            texts = decode_responses(responses, processor)
            for b, prompt in enumerate(batch.prompts):
                views.append(ProbeView(prompt, texts[b][0], *(mass[b][batch.visual_mask[b]] for mass in masses)))
    return views


def view_tokens(
    engine: StageEngine,
    prompts: Iterable[Prompt],
    processor: PromptProcessor,
    settings: EvaluationSettings,
    layers: Sequence[int],
) -> Iterator[TokenViews]:
    """Yield scored greedy responses and the attention of each of their rows over the image. No gradient.

    It runs in one process only, because the rows of a layer are whole on one rank only where there is one.

    Args:
        engine: Frozen model of a world of one rank.
        prompts: Prompts to answer.
        processor: Tokenizer for the texts of the responses.
        settings: Generation and reward.
        layers: 0-based layers whose rows are returned.
    """
    assert engine.layout.world_size == 1, "the rows of a layer are whole on one rank only where there is one"

    def over_prompt(rows: AttentionRows, groups: GroupBatch) -> Tensor:
        """Return [B, R, P]: the attention of each response row over the prompt."""
        return rows.distribution()[:, 0, :, : groups.prompts.input_ids.shape[1]].cpu()

    with engine.resident():
        for responses, _, attention in greedy_batches(engine, prompts, processor, settings, layers, over_prompt):
            score, batch = score_responses(responses, processor, settings.reward, engine), responses.prompts
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


def _mean_row(rows: AttentionRows, groups: GroupBatch) -> Tensor:
    return _mean_distribution(rows.distribution(), groups)


def _mean_distribution(distribution_BGRS: Tensor, groups: GroupBatch) -> Tensor:
    """Return [B, P]: the attention distribution over the prompt's keys, averaged over response rows."""
    mask = groups.response_mask.to(distribution_BGRS.device)[..., None]
    over_prompt = distribution_BGRS[..., : groups.prompts.input_ids.shape[1]]
    return (over_prompt * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2))
