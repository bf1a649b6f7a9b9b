"""Probes: a few fixed prompts, their greedy responses, and the attention of response rows over the image."""

from dataclasses import dataclass
from typing import Iterable, Iterator, Mapping, Optional, Sequence

import torch
from torch import Tensor

from megatron_ral.attention.deciding import deciding_rows
from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.attention.types import QueryPosition
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
    deciding_attention: Optional[Tensor] = None
    """`visual_attention` of the deciding row alone (`attention/deciding.py`). None: the response has none."""


@dataclass(frozen=True)
class TokenViews:
    """One prompt, its scored greedy response, and the attention of each response row over the image."""

    prompt: Prompt
    token_ids: Tensor
    """[R] int64, end-of-turn token included."""
    deciding_token: int
    """Index of the token whose row predicts the first token of the answer. -1: there is none."""
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

    def share(rows_BKP: Optional[Tensor], groups: GroupBatch, count: int) -> Tensor:
        """Return the tensor [B, count, P] of the stage that owns the layer on every stage."""
        if rows_BKP is None:
            rows_BKP = torch.zeros(len(groups), count, groups.prompts.input_ids.shape[1])
        on_device = rows_BKP.to(engine.process_groups.device).contiguous()
        return broadcast_from_stage_(on_device, owner, engine.process_groups).cpu()

    with engine.resident():
        for responses, groups, attention in greedy_batches(
            engine, prompts, processor, settings, [layer], _mean_and_deciding
        ):
            batch, masses, read_rows = responses.prompts, share(attention.get(layer), groups, 2), None
            if teacher is not None:
                [read] = teacher.read([groups], [layer], store=lambda rows, _: rows.distribution(), hidden_states=False)
                rows = read.attention.get(layer)
                if rows is not None:
                    rows = rows[..., : groups.prompts.input_ids.shape[1]]
                read_rows = share(None if rows is None else _mean(rows, groups.response_mask), groups, 1)
            texts = decode_responses(responses, processor)
            for b, prompt in enumerate(batch.prompts):
                mean, deciding = masses[b][:, batch.visual_mask[b]]
                views.append(
                    ProbeView(
                        prompt,
                        texts[b][0],
                        mean,
                        None if read_rows is None else read_rows[b, 0][batch.visual_mask[b]],
                        deciding if bool(deciding_rows(groups, QueryPosition.RESPONSE)[b].any()) else None,
                    )
                )
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
        for responses, groups, attention in greedy_batches(engine, prompts, processor, settings, layers, over_prompt):
            assert groups.answer_tokens is not None
            answers = groups.answer_tokens
            score, batch = (
                score_responses(responses, processor, settings.reward, engine, settings.reward_time_limit),
                responses.prompts,
            )
            for b, prompt in enumerate(batch.prompts):
                length = int(responses.response_lengths[b, 0])
                yield TokenViews(
                    prompt,
                    responses.response_ids[b, 0, :length],
                    int(answers[b, 0]) - 1 if answers[b, 0] > 0 else -1,
                    score.texts[b][0],
                    float(score.rewards[b, 0]),
                    {name: float(values[b, 0]) for name, values in score.components.items()},
                    {layer: rows[b, :length][:, batch.visual_mask[b]] for layer, rows in attention.items()},
                )


def _mean_and_deciding(rows: AttentionRows, groups: GroupBatch) -> Tensor:
    """Return [B, 2, P]: the distribution over the prompt averaged over response rows, and that of the deciding row."""
    distribution = rows.distribution()[..., : groups.prompts.input_ids.shape[1]]
    deciding = deciding_rows(groups, QueryPosition.RESPONSE)
    return torch.cat([_mean(distribution, groups.response_mask), _mean(distribution, deciding)], dim=1)


def _mean(distribution_BGRS: Tensor, mask_BGR: Tensor) -> Tensor:
    """Return the mean of the chosen rows, [B, 1, S]. Zeros where none is chosen."""
    mask = mask_BGR.to(distribution_BGRS.device)[..., None]
    return ((distribution_BGRS * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp(min=1))[:, None]
