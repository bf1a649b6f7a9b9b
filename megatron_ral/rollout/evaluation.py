"""Held-out evaluation: greedy responses, accuracy, format, and how much of the visual attention meets the target."""

from dataclasses import dataclass
from typing import Callable, Sequence

import torch
from torch import Tensor

from megatron_ral.config import RunConfig
from megatron_ral.data.processor import PromptProcessor, SampleError
from megatron_ral.data.shards import epoch_entries, parse_sample
from megatron_ral.engine.generate import SamplingSettings
from megatron_ral.engine.protocol import AttentionRows
from megatron_ral.engine.stage import StageEngine
from megatron_ral.parallel.collectives import broadcast_from_stage_, sum_metrics
from megatron_ral.rollout.collect import sample_responses, score_responses
from megatron_ral.types import GroupBatch, Prompt, ResponseBatch, to_device


@dataclass(frozen=True)
class Evaluation:
    """Results over all data-parallel ranks."""

    accuracy: float
    format_rate: float
    target_attention: float
    """Attention mass of response rows on the asked cell's visual tokens / mass on all visual tokens, mean over rows."""
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


def read_prompts(shards: Sequence[str], processor: PromptProcessor, limit: int, *, dp_rank: int = 0,
                 dp_size: int = 1) -> list[Prompt]:
    """The first `limit` usable samples of the shards in file order, of which this rank keeps every dp_size-th: the set
    does not depend on the number of ranks."""
    prompts, seen = [], 0
    for entry in epoch_entries(shards, dp_rank=0, dp_size=1, epoch=0, seed=0, shuffle=False, shuffle_buffer=1):
        if seen == limit:
            break
        try:
            sample = parse_sample(entry)
            prompt = processor(sample) if seen % dp_size == dp_rank or limit <= dp_size else None
        except (SampleError, ValueError):
            continue
        if seen % dp_size == dp_rank:
            prompts.append(prompt)
        seen += 1
    return prompts


def evaluate_prompts(engine: StageEngine, prompts: Sequence[Prompt], processor: PromptProcessor, config: RunConfig,
                     layer: int, progress: Callable[[int], None] = lambda count: None) -> Evaluation:
    """Greedy evaluation of this rank's prompts, reduced over all ranks.

    Args:
        engine: policy or frozen engine.
        prompts: this rank's share.
        layer: 0-based layer whose attention is measured.
        progress: called with the number of prompts done.
    """
    sums: dict[str, float] = {}
    with engine.resident():
        for responses, rows in _greedy_batches(engine, prompts, processor, config, layer):
            score = score_responses(responses, processor, config)
            if engine.layout.is_last_stage:
                _add(sums, {"prompts": len(score.rewards), "accuracy": score.components["accuracy"].sum(),
                            "format": score.components["format"].sum()})
            if rows is not None:
                _add(sums, _attention_sums(responses, rows))
            progress(len(responses.prompts))
    total = sum_metrics(sums, engine.groups)
    count = max(total.get("prompts", 0.0), 1.0)
    return Evaluation(
        accuracy=total.get("accuracy", 0.0) / count, format_rate=total.get("format", 0.0) / count,
        target_attention=total.get("target", 0.0) / max(total.get("annotated_rows", 0.0), 1.0),
        visual_mass=total.get("visual", 0.0) / max(total.get("rows", 0.0), 1.0), num_prompts=int(total["prompts"]))


def view_probes(engine: StageEngine, prompts: Sequence[Prompt], processor: PromptProcessor, config: RunConfig,
                layer: int) -> list[ProbeView]:
    """Greedy responses of fixed prompts and the attention of their rows over the image, on every rank."""
    views = []
    owner = layer // (engine.shape.num_layers // engine.layout.pipeline_size)
    with engine.resident():
        for responses, rows in _greedy_batches(engine, prompts, processor, config, layer):
            batch = responses.prompts
            mass = torch.zeros(len(batch), batch.input_ids.shape[1], device=engine.groups.device)
            if rows is not None:
                mask = _group_batch(responses).response_mask[..., None].to(mass.device)
                mass = (rows.policy[..., : mass.shape[1]] * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2))
            mass = broadcast_from_stage_(mass.contiguous(), owner, engine.groups).cpu()
            score = score_responses(responses, processor, config)
            for b, prompt in enumerate(batch.prompts):
                views.append(ProbeView(prompt, score.texts[b][0], mass[b][batch.visual_mask[b]]))
    return views


def _group_batch(responses: ResponseBatch, embeds=None) -> GroupBatch:
    return GroupBatch(responses.prompts, responses.response_ids, responses.response_lengths, embeds)


def _greedy_batches(engine: StageEngine, prompts: Sequence[Prompt], processor: PromptProcessor, config: RunConfig,
                    layer: int):
    """Yield (responses, attention rows of `layer` on its owner, None elsewhere), batch by batch."""
    settings = SamplingSettings(1, config.rollout.max_response_length, processor.end_token_id, processor.pad_token_id,
                                temperature=0.0)
    size = config.rollout.generation_batch_size
    for start in range(0, len(prompts), size):
        chosen = prompts[start:start + size]
        for responses, embeds in sample_responses(engine, chosen, processor, settings, size):
            output = engine.forward([_group_batch(responses, embeds)], [layer])[0]
            yield responses, output.attention.get(layer)


def _attention_sums(responses: ResponseBatch, rows: AttentionRows) -> dict[str, Tensor]:
    groups = to_device(_group_batch(responses), rows.policy.device)
    prompts, mask, P = groups.prompts, groups.response_mask, rows.layout.P
    visual = (rows.policy[..., :P] * prompts.visual_mask[:, None, None]).sum(-1)
    target = (rows.policy[..., :P] * prompts.target_mask[:, None, None]).sum(-1)
    annotated = mask & prompts.target_mask.any(-1)[:, None, None]
    share = torch.where(visual > 0, target / visual.clamp(min=1e-30), 0.0)
    return {"rows": mask.sum(), "visual": (visual * mask).sum(), "annotated_rows": annotated.sum(),
            "target": (share * annotated).sum()}


def _add(sums: dict[str, float], values: dict) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + float(value)
