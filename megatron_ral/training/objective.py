"""Losses as values that an engine calls back: supervised cross-entropy, and the GRPO family with the term of RAL."""

from dataclasses import asdict, dataclass, replace
from typing import Literal, Mapping, Optional

import torch
from torch import Tensor

from megatron_ral.config.sections import LossConfig
from megatron_ral.engine.protocol import AttentionRows, TokenOutputs
from megatron_ral.functional.aggregation import token_weights
from megatron_ral.functional.attention_loss import attention_rl_loss
from megatron_ral.functional.attention_mass import row_mass
from megatron_ral.functional.kl import kl_estimate
from megatron_ral.functional.policy_loss import PolicyLoss, cispo_loss, grpo_loss, gspo_loss
from megatron_ral.types import TrainBatch

Metrics = Mapping[str, Tensor]


@dataclass(frozen=True)
class SftObjective:
    """Mean cross-entropy of the response tokens over the global batch."""

    recorded_layers: frozenset[int] = frozenset()
    temperature: float = 1.0

    def token_loss(self, outputs: TokenOutputs, batch: TrainBatch) -> tuple[Tensor, Metrics]:
        mask, num_tokens = batch.loss_mask, batch.totals.num_tokens
        loss = -(outputs.logprobs * mask).sum() / num_tokens
        return loss, {"loss": loss.detach(), "entropy": (outputs.entropy.detach() * mask).sum() / num_tokens}

    def attention_loss(self, layer: int, rows: AttentionRows, batch: TrainBatch) -> tuple[Optional[Tensor], Metrics]:
        return None, {}


@dataclass(frozen=True)
class RalObjective:
    """L =  sum_t w_t [ policy_t + kl_coef * KL_t - entropy_coef * H_t ]
          + attention_coef * sum_t A JSD(p_theta || p_target) / T

    with w_t of `token_weights` (1 / T by default) and T the response tokens of the whole optimizer step; several layers
    are averaged. attention_coef = 0 is GRPO, or what the settings say of its family. With filter_equal_rewards t runs
    over groups that have a signal, and T counts those alone.
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
        settings, mask = self.settings, batch.loss_mask
        weights = token_weights(mask, settings.aggregation, **asdict(batch.totals)).to(outputs.logprobs.dtype)
        policy = self._policy_loss(outputs.logprobs, batch, mask)

        def mean(values: Tensor) -> Tensor:
            """Over tokens whatever the aggregation, for the log."""
            return (values.detach() * mask).sum() / batch.totals.num_tokens

        loss = (policy.loss * weights).sum()
        metrics = {
            "loss/policy": loss.detach(), "entropy": mean(outputs.entropy),
            "clip_ratio/low": mean(policy.clipped_low), "clip_ratio/high": mean(policy.clipped_high),
            "ratio": mean(policy.ratio),
        }
        if batch.ref_logprobs is not None:
            kl = kl_estimate(outputs.logprobs, batch.ref_logprobs, settings.kl_estimator, value_clamp=settings.kl_clamp)
            loss = loss + settings.kl_coef * (kl * weights).sum()
            metrics["kl"] = mean(kl)
        if settings.entropy_coef > 0:
            loss = loss - settings.entropy_coef * (outputs.entropy * weights).sum()
        metrics["loss/token"] = loss.detach()
        return loss, metrics

    def _policy_loss(self, logprobs: Tensor, batch: TrainBatch, mask: Tensor) -> PolicyLoss:
        settings, arguments = self.settings, (logprobs, batch.old_logprobs, batch.advantages, mask)
        bounds = {"clip_low": settings.clip_low, "clip_high": settings.clip_high}
        if settings.policy_loss == "cispo":
            return cispo_loss(*arguments, **bounds)
        clipped = {"grpo": grpo_loss, "gspo": gspo_loss}[settings.policy_loss]
        return clipped(*arguments, **bounds, dual_clip=settings.dual_clip)

    def attention_loss(self, layer: int, rows: AttentionRows, batch: TrainBatch) -> tuple[Optional[Tensor], Metrics]:
        active = self.settings.attention_coef > 0
        with torch.set_grad_enabled(active and torch.is_grad_enabled()):
            per_row, divergence = attention_rl_loss(rows.policy, batch.target_attention[layer], batch.advantages)
        mask = batch.loss_mask
        share = 1.0 / (batch.totals.num_tokens * len(self.recorded_layers))
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
    mask = batch.loss_mask
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
