"""Losses as values that an engine calls back: supervised cross-entropy, and GRPO with the attention term of RAL."""

from dataclasses import dataclass, replace
from typing import Literal, Mapping, Optional

import torch
from torch import Tensor

from megatron_ral.config.sections import LossConfig
from megatron_ral.engine.protocol import AttentionRows, TokenOutputs
from megatron_ral.functional.attention_loss import attention_rl_loss
from megatron_ral.functional.attention_mass import row_mass
from megatron_ral.functional.kl import kl_k3
from megatron_ral.functional.policy_loss import clipped_surrogate
from megatron_ral.types import TrainBatch

Metrics = Mapping[str, Tensor]


@dataclass(frozen=True)
class SftObjective:
    """Mean cross-entropy of the response tokens over the global batch."""

    recorded_layers: frozenset[int] = frozenset()
    temperature: float = 1.0

    def token_loss(self, outputs: TokenOutputs, batch: TrainBatch) -> tuple[Tensor, Metrics]:
        mask = batch.groups.response_mask
        loss = -(outputs.logprobs * mask).sum() / batch.denominator
        return loss, {"loss": loss.detach(), "entropy": (outputs.entropy * mask).sum() / batch.denominator}

    def attention_loss(self, layer: int, rows: AttentionRows, batch: TrainBatch) -> tuple[Optional[Tensor], Metrics]:
        return None, {}


@dataclass(frozen=True)
class RalObjective:
    """L = sum_t [ clipped surrogate + kl_coef * k3 ] / T  +  attention_coef * sum_t A JSD(p_theta || p_target) / T

    with T the response tokens of the whole optimizer step; several layers are averaged. attention_coef = 0 is GRPO.
    """

    settings: LossConfig
    recorded_layers: frozenset[int]
    temperature: float = 1.0
    parts: Literal["all", "attention"] = "all"
    """`attention`: the attention term alone (to measure its gradient)."""

    def only_attention(self) -> "RalObjective":
        return replace(self, parts="attention")

    def token_loss(self, outputs: TokenOutputs, batch: TrainBatch) -> tuple[Tensor, Metrics]:
        if self.parts == "attention":
            return 0.0 * outputs.logprobs.sum(), {}
        settings, mask = self.settings, batch.groups.response_mask
        policy = clipped_surrogate(outputs.logprobs, batch.old_logprobs, batch.advantages[..., None],
                                   clip_low=settings.clip_low, clip_high=settings.clip_high)

        def mean(values: Tensor) -> Tensor:
            return (values * mask).sum() / batch.denominator

        surrogate = mean(policy.loss)
        loss, metrics = surrogate, {
            "loss/policy": surrogate.detach(), "entropy": mean(outputs.entropy),
            "clip_ratio/low": mean(policy.clipped_low), "clip_ratio/high": mean(policy.clipped_high),
            "ratio": mean(policy.ratio),
        }
        if batch.ref_logprobs is not None:
            kl = mean(kl_k3(outputs.logprobs, batch.ref_logprobs))
            loss = loss + settings.kl_coef * kl
            metrics["kl"] = kl.detach()
        metrics["loss/token"] = loss.detach()
        return loss, metrics

    def attention_loss(self, layer: int, rows: AttentionRows, batch: TrainBatch) -> tuple[Optional[Tensor], Metrics]:
        active = self.settings.attention_coef > 0
        with torch.set_grad_enabled(active and torch.is_grad_enabled()):
            per_row, divergence = attention_rl_loss(rows.policy, batch.target_attention[layer], batch.advantages)
        mask = batch.groups.response_mask
        share = 1.0 / (batch.denominator * len(self.recorded_layers))
        loss = self.settings.attention_coef * (per_row * mask).sum() * share if active else None
        if self.parts == "attention":
            return loss, {}
        metrics = attention_metrics(rows, batch, share)
        metrics["attention/divergence"] = (divergence * mask).sum() * share
        for name, rows_of_sign in (("positive", batch.advantages > 0), ("negative", batch.advantages < 0)):
            chosen = mask & rows_of_sign[..., None]
            metrics[f"attention/divergence_{name}:sum"] = (divergence * chosen).sum()
            metrics[f"attention/divergence_{name}:count"] = chosen.sum()
        metrics["loss/attention"] = loss.detach() if loss is not None else torch.zeros(())
        return loss, metrics


@torch.no_grad()
def attention_metrics(rows: AttentionRows, batch: TrainBatch, share: float) -> dict[str, Tensor]:
    """Where response rows look; `share` turns a sum over rows into this layer's part of the mean.

    `attention/target_mass` is the mass on the annotated cells divided by the mass on all visual tokens, over the rows
    of prompts that have an annotation; it is handed on as sum and count.
    """
    mask = batch.groups.response_mask
    mass = row_mass(rows.policy, batch.groups.prompts.visual_mask, batch.groups.prompts.target_mask, mask)
    own = rows.attention.masked_fill(~rows.layout.self_RS, 0.0).sum(-1)
    return {
        "attention/visual_mass": (mass.visual * mask).sum() * share,
        "attention/sink_mass": (rows.policy[..., 0] * mask).sum() * share,
        "attention/self_mass": (own * mask).sum() * share,
        "attention/target_mass:sum": (mass.target_share * mass.annotated).sum(),
        "attention/target_mass:count": mass.annotated.sum(),
    }


def finish_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Divide `name:sum` by `name:count`; other metrics are means already."""
    done = {name: value for name, value in sums.items() if not name.endswith((":sum", ":count"))}
    for name, value in sums.items():
        if name.endswith(":sum"):
            stem = name[: -len(":sum")]
            count = sums[f"{stem}:count"]
            if count:
                done[stem] = value / count
    return done
