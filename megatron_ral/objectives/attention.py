"""Attention term of RAL: divergence of attention distributions from a target, weighted by advantages."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ral.attention.deciding import deciding_rows, row_sums
from megatron_ral.attention.distribution import key_mass
from megatron_ral.attention.group_layout import AttentionRecord
from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.attention.mass import row_masses
from megatron_ral.attention.targets.base import AttentionTarget
from megatron_ral.attention.targets.load import load_target
from megatron_ral.attention.targets.registry import TARGETS, TargetPass
from megatron_ral.attention.types import QueryPosition, RowKeys
from megatron_ral.config.loss import LossConfig
from megatron_ral.objectives.base import Metrics, Term, sums_and_counts
from megatron_ral.types import GroupBatch, PromptBatch, RlBatch

PRECISION_FLOOR = {torch.float64: 1e-26, torch.float32: 1e-12, torch.bfloat16: 1e-4}
"""Divergence in nats below which a row may differ from its target by rounding alone, by the precision of queries and
keys (see "Precision" in docs/results/measurements.md)."""


@dataclass(frozen=True)
class AttentionTerm(Term):
    """coefficient * sum over rows of weight * D(distribution of the row, target) / rows of the optimizer step, averaged
    over layers (attention_normalizer = sequence_sum: over responses in place of rows).

    Target and weights are those of `attention/targets`. Source: RAL paper (arXiv 2602.04884) eq. (2), (3).
    """

    settings: LossConfig
    layers: frozenset[int]
    """0-based layers, over which the term is averaged."""
    coefficient: float
    """Coefficient of this optimizer step: `attention_coef` with its schedule."""

    name = "attention"

    @property
    def recorded_layers(self) -> frozenset[int]:
        return self.layers

    @property
    def is_active(self) -> bool:
        return self.coefficient > 0

    @property
    def target(self) -> AttentionTarget:
        """Target of `loss.attention_target`."""
        return load_target(self.settings.attention_target)

    @property
    def target_pass(self) -> TargetPass:
        """Forward pass that the target's rows come from."""
        return TARGETS[self.settings.attention_target].needs

    @property
    def stored_position(self) -> QueryPosition:
        """Query position at which the target's pass is read."""
        return QueryPosition(self.settings.attention_row)

    @property
    def position(self) -> QueryPosition:
        """Query position whose rows carry the gradient."""
        return self.target.position(self.stored_position)

    @property
    def row_weighting(self) -> str:
        """Weighting of the rows of a response: `loss.attention_rows`, or `all` where the prompt's last row is the only
        one."""
        return "all" if self.position is QueryPosition.LAST_PROMPT else self.settings.attention_rows

    def store(self, rows: AttentionRows, groups: GroupBatch) -> Any:
        """Return what is stored of the target's pass until the update: rows, or queries and keys (attention_store)."""
        if self.settings.attention_store == "qk":
            return rows.record.detached()
        return self.target.summarize(rows, self._keys(rows, groups.prompts), groups)

    def attention_loss(self, layer: int, rows: AttentionRows, batch: RlBatch) -> tuple[Tensor, Metrics]:
        with torch.set_grad_enabled(self.is_active and torch.is_grad_enabled()):
            loss, measured = self._loss(layer, rows, batch)
        return loss, {**attention_metrics(layer, rows, batch), **measured, "loss/attention": loss.detach()}

    def _loss(self, layer: int, rows: AttentionRows, batch: RlBatch) -> tuple[Tensor, Metrics]:
        """Return the loss of one layer and its metrics."""
        settings, totals = self.settings, batch.totals
        keys = self._keys(rows, batch.groups.prompts)
        target = self._target_distribution(layer, rows, keys, batch)
        divergence = rows.divergence(target, keys, self.target.divergence or settings.attention_divergence)
        has_cap = settings.attention_row_cap > 0 and self.target.divergence is None
        capped = divergence.clamp(max=settings.attention_row_cap) if has_cap else divergence
        mask = self._mask(batch) & (target.sum(dim=-1) > 0)
        one_row = self.row_weighting == "deciding" or settings.attention_normalizer == "sequence_sum"
        rows_in_step = totals.num_sequences if one_row else totals.num_tokens
        weights = self.target.weights(batch, settings.attention_negative_weight)
        if self.row_weighting == "visual":
            weights = weights * key_mass(rows.attention, rows.named_keys("visual", batch.groups.prompts, False))
        loss = (capped * (weights * mask)).sum() * (self.coefficient / (rows_in_step * len(self.layers)))
        floor = PRECISION_FLOOR[rows.record.query_BGRnD.dtype]
        return loss, self._divergence_metrics(divergence.detach(), batch, mask, floor)

    def _keys(self, rows: AttentionRows, prompts: PromptBatch) -> RowKeys:
        return rows.named_keys(self.settings.attention_keys, prompts, self.settings.attention_exclude_self)

    def _target_distribution(self, layer: int, rows: AttentionRows, keys: RowKeys, batch: RlBatch) -> Tensor:
        """Return distributions over the same keys, which broadcast to the rows' map."""
        if self.target_pass is TargetPass.NONE:
            stored = None
        elif self.target_pass is TargetPass.ROLLOUT_POLICY and batch.is_on_policy:
            # A pass of the rollout's policy would give what this pass gives.
            own = rows.at(self.stored_position)
            stored = self.target.summarize(own, self._keys(own, batch.groups.prompts), batch.groups)
            stored = self.target.combine(stored, batch.attention_advantages)
        else:
            stored = batch.target_attention[layer]
        if isinstance(stored, AttentionRecord):
            return rows.of_record(stored).distribution(keys)
        return self.target.distribution(stored, rows, keys, batch)

    def _mask(self, batch: RlBatch) -> Tensor:
        """Return the mask of rows that count."""
        if self.position is not QueryPosition.LAST_PROMPT:
            if self.row_weighting == "deciding":
                return batch.loss_mask & deciding_rows(batch.groups, self.position)
            return batch.loss_mask
        return batch.loss_mask.any(dim=-1).any(dim=-1)[:, None, None]

    def _divergence_metrics(self, divergence: Tensor, batch: RlBatch, mask: Tensor, floor: float) -> dict[str, Tensor]:
        chosen = {"divergence": mask}
        if self.position is not QueryPosition.LAST_PROMPT:
            advantages = batch.attention_advantages[..., None]
            chosen |= {"divergence_positive": mask & (advantages > 0), "divergence_negative": mask & (advantages < 0)}
        masks = torch.stack([*chosen.values(), (divergence > floor) & mask])
        sums, counts = (masks * divergence).sum(dim=(1, 2, 3)), masks.sum(dim=(1, 2, 3))
        metrics = sums_and_counts([f"attention/{name}" for name in chosen], sums, counts)
        return metrics | {"attention/above_floor:sum": counts[-1], "attention/above_floor:count": counts[0]}


@torch.no_grad()
def attention_metrics(layer: int, rows: AttentionRows, batch: RlBatch) -> dict[str, Tensor]:
    """Return where the response tokens' rows look under the paper's distribution (all keys but the own), whatever the
    term's settings.

    The values are sums and counts. `attention/target_mass` is the mass on the annotated cells divided by the mass on
    all visual tokens, over all rows of prompts that have an annotation. `attention/target_deciding` is the same over
    deciding rows, `attention/target_peak` the largest over the rows of a response. Each is given over all recorded
    layers, and with the suffix `/layer_N` for this one.
    """
    rows, mask, prompts = rows.at(QueryPosition.RESPONSE), batch.loss_mask, batch.groups.prompts
    values = row_masses(rows.attention, rows.keys(), prompts.visual_mask, prompts.target_mask)
    sums, count, shares = row_sums(values, batch.groups, mask)
    names = ["visual_mass", "prompt_mass", "sink_mass", "self_mass", "row_entropy"]  # in the order of RowMass
    metrics = sums_and_counts([f"attention/{name}" for name in names], sums, count.expand(len(names)))
    for name, (total, number) in shares.named().items():
        for tag in (f"attention/{name}", f"attention/{name}/layer_{layer}"):
            metrics |= {f"{tag}:sum": total, f"{tag}:count": number}
    return metrics
