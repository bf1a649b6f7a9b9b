"""The attention term of RAL as its settings have it: which rows, over which keys, compared with what, how weighted."""

from dataclasses import dataclass
from typing import Any, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ral.config.loss import LossConfig
from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.attention.mass import row_mass
from megatron_ral.attention.rows import RowKeys, attention_distribution
from megatron_ral.attention.targets.success import mean_prompt_row, success_target
from megatron_ral.attention.group_layout import AttentionRecord
from megatron_ral.types import GroupBatch, PromptBatch, TrainBatch

PRECISION_FLOOR = {torch.float64: 1e-26, torch.float32: 1e-12, torch.bfloat16: 1e-4}
"""Divergence in nats below which a row may differ from its target by rounding alone, by the precision of queries and keys
(see "Precision" in docs/measurements.md)."""

ROLLOUT_POLICY = ("old", "group", "hindsight")
"""Targets made of rows of the policy that made the rollout."""


def row_keys(rows: AttentionRows, prompts: PromptBatch, kind: str, exclude_self: bool) -> RowKeys:
    """Keys a policy is made of: `all`, `visual` or `prompt`, with or without the row's own token."""
    columns = None
    if kind != "all":
        inside = torch.arange(rows.layout.P, device=rows.attention.device) < prompts.prompt_lengths[:, None]
        columns = F.pad(
            prompts.visual_mask if kind == "visual" else inside, (0, rows.attention.shape[-1] - rows.layout.P)
        )
    return rows.keys(columns, exclude_self)


@dataclass(frozen=True)
class AttentionTerm:
    """loss = sum over rows of weight * D(policy of the row, target) / rows (attention_normalizer = sequence_sum:
    responses) of the optimizer step, mean over layers.

    | target | compared with | weight of a row |
    |---|---|---|
    | old | the policy that made the rollout (paper) | advantage |
    | reference | the frozen reference model | advantage |
    | ema | an exponential average of past policies | advantage |
    | group | mean prompt row of the successful responses | minus the advantage, where it is negative |
    | hindsight | the same; the row is the prompt's last | sum of the positive advantages |
    | oracle | the annotated box, uniformly | 1, where there is one |

    Source: RAL paper (arXiv 2602.04884) eq. (2), (3) for `old`; the others are this project's.
    """

    settings: LossConfig
    num_layers: int
    """Recorded layers, over which the term is averaged."""

    @property
    def row_kind(self) -> str:
        """Rows that carry the gradient."""
        return "last_prompt" if self.settings.attention_target == "hindsight" else self.settings.attention_row

    def keys(self, rows: AttentionRows, prompts: PromptBatch) -> RowKeys:
        """Keys the policies are made of."""
        return row_keys(rows, prompts, self.settings.attention_keys, self.settings.attention_exclude_self)

    def keep(self, rows: AttentionRows, groups: GroupBatch) -> Any:
        """What is kept of the rows of a target's pass until the update."""
        if self.settings.attention_store == "qk":
            return rows.record.detached()
        return self._kept_policy(rows, groups)

    def _kept_policy(self, rows: AttentionRows, groups: GroupBatch) -> Tensor:
        policy = rows.policy(self.keys(rows, groups.prompts))
        if self.settings.attention_target in ("group", "hindsight"):
            return mean_prompt_row(policy, groups.response_mask, rows.layout.P)
        return policy

    def loss(self, layer: int, rows: AttentionRows, batch: TrainBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss of one layer at coefficient 1 and what is logged of it."""
        settings, totals = self.settings, batch.totals
        keys = self.keys(rows, batch.groups.prompts)
        target = self._target(layer, rows, keys, batch)
        divergence = rows.divergence(target, keys, settings.attention_divergence)
        capped = divergence.clamp(max=settings.attention_row_cap) if settings.attention_row_cap else divergence
        mask = self._mask(batch) & (target.sum(dim=-1) > 0)
        rows_in_step = totals.num_tokens if settings.attention_normalizer == "token_mean" else totals.num_sequences
        loss = (capped * self._weights(batch) * mask).sum() / (rows_in_step * self.num_layers)
        floor = PRECISION_FLOOR[rows.record.query_BGRnD.dtype]
        return loss, self._divergence_metrics(divergence.detach(), batch, mask, floor)

    def _target(self, layer: int, rows: AttentionRows, keys: RowKeys, batch: TrainBatch) -> Tensor:
        """Distributions over the same keys, which broadcast to the rows' map."""
        if self.settings.attention_target == "oracle":
            box = batch.groups.prompts.target_mask.to(rows.attention.dtype)
            row = box / box.sum(dim=-1, keepdim=True).clamp(min=1.0)
        else:
            row = self._own_target(rows, batch) if self._is_own(batch) else batch.target_attention[layer]
            if isinstance(row, AttentionRecord):
                return rows.of_record(row).policy(keys)
            if self.settings.attention_target not in ("group", "hindsight"):
                return row
        row = F.pad(row, (0, rows.attention.shape[-1] - row.shape[-1]))[:, None, None]
        # The own token of a response's row is none of the prompt's; that of the other kinds may be, and is left out.
        if self.row_kind == "token":
            return row
        return attention_distribution(row.expand(-1, -1, rows.attention.shape[2], -1), keys)[0]

    def _is_own(self, batch: TrainBatch) -> bool:
        return batch.on_policy and self.settings.attention_target in ROLLOUT_POLICY

    def _own_target(self, rows: AttentionRows, batch: TrainBatch) -> Tensor:
        """What a pass of the policy before this update would have kept: it is this pass."""
        kept = self._kept_policy(rows.of_kind(self.settings.attention_row), batch.groups)
        if self.settings.attention_target == "old":
            return kept
        return success_target(kept, batch.attention_advantages)

    def _weights(self, batch: TrainBatch) -> Tensor:
        """Weight of every row, broadcasting to [B, G, R]; positive pulls towards the target."""
        advantages, target = batch.attention_advantages, self.settings.attention_target
        if target == "oracle":
            return batch.groups.prompts.target_mask.any(dim=-1)[:, None, None].float()
        if target == "hindsight":
            return advantages.clamp(min=0).sum(dim=1)[:, None, None]
        weighted = torch.where(advantages < 0, advantages * self.settings.attention_negative_weight, advantages)
        return (weighted if target != "group" else (-weighted).clamp(min=0))[..., None]

    def _mask(self, batch: TrainBatch) -> Tensor:
        """Rows that count."""
        if self.row_kind != "last_prompt":
            return batch.loss_mask
        return batch.loss_mask.any(dim=-1).any(dim=-1)[:, None, None]

    def _divergence_metrics(
        self, divergence: Tensor, batch: TrainBatch, mask: Tensor, floor: float
    ) -> dict[str, Tensor]:
        chosen = {"divergence": mask}
        if self.row_kind != "last_prompt":
            advantages = batch.attention_advantages[..., None]
            chosen |= {"divergence_positive": mask & (advantages > 0), "divergence_negative": mask & (advantages < 0)}
        metrics = {}
        for name, rows in chosen.items():
            metrics[f"attention/{name}:sum"] = (divergence * rows).sum()
            metrics[f"attention/{name}:count"] = rows.sum()
        metrics["attention/above_floor:sum"] = ((divergence > floor) & mask).sum()
        metrics["attention/above_floor:count"] = mask.sum()
        return metrics


@torch.no_grad()
def attention_metrics(rows: AttentionRows, batch: TrainBatch) -> dict[str, Tensor]:
    """Where the response tokens' rows look under the paper's policy (all keys but the own), whatever the term's settings.

    Sums and counts over rows. `attention/target_mass` is the mass on the annotated cells divided by the mass on all
    visual tokens, over the rows of prompts that have an annotation.
    """
    rows, mask, prompts = rows.of_kind("token"), batch.loss_mask, batch.groups.prompts
    mass = row_mass(rows.attention, rows.keys(), prompts.visual_mask, prompts.target_mask)
    annotated = mask & prompts.target_mask.any(dim=-1)[:, None, None]
    metrics = {
        "attention/target_mass:sum": (mass.target_share * annotated).sum(),
        "attention/target_mass:count": annotated.sum(),
    }
    for name, values in (
        ("visual_mass", mass.visual),
        ("prompt_mass", mass.prompt),
        ("sink_mass", mass.sink),
        ("self_mass", rows.own_mass()),
        ("row_entropy", mass.entropy),
    ):
        metrics[f"attention/{name}:sum"] = (values * mask).sum()
        metrics[f"attention/{name}:count"] = mask.sum()
    return metrics
