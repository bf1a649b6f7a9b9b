"""Losses as values that an engine calls back: supervised cross-entropy, and the GRPO family with the term of RAL."""

from dataclasses import asdict, dataclass, replace
from typing import Literal, Mapping, Optional

import torch
from torch import Tensor

from megatron_ral.config.sections import LossConfig
from megatron_ral.engine.protocol import AttentionRows, TokenOutputs
from megatron_ral.functional.aggregation import token_weights
from megatron_ral.functional.kl import kl_estimate
from megatron_ral.functional.policy_loss import PolicyLoss, cispo_loss, grpo_loss, gspo_loss
from megatron_ral.training.attention_term import AttentionTerm, attention_metrics
from megatron_ral.types import TrainBatch

Metrics = Mapping[str, Tensor]


@dataclass(frozen=True)
class SftObjective:
    """Mean cross-entropy of the response tokens over the global batch."""

    recorded_layers: frozenset[int] = frozenset()
    row_kind: str = "token"
    temperature: float = 1.0

    def token_loss(self, outputs: TokenOutputs, batch: TrainBatch) -> tuple[Tensor, Metrics]:
        mask, num_tokens = batch.loss_mask, batch.totals.num_tokens
        loss = -(outputs.logprobs * mask).sum() / num_tokens
        return loss, {"loss": loss.detach(), "entropy": (outputs.entropy.detach() * mask).sum() / num_tokens}

    def attention_loss(self, layer: int, rows: AttentionRows, batch: TrainBatch) -> tuple[Optional[Tensor], Metrics]:
        return None, {}


@dataclass(frozen=True)
class RalObjective:
    """L =  sum_t w_t [ policy_t + kl_coef * KL_t - entropy_coef * H_t ]  +  attention_coef * attention term

    with w_t of `token_weights` (1 / T by default), T the response tokens of the whole optimizer step, and the attention
    term of `AttentionTerm`. attention_coef = 0 is GRPO, or what the settings say of its family. With
    filter_equal_rewards t runs over groups that have a signal, and T counts those alone.
    """

    settings: LossConfig
    recorded_layers: frozenset[int]
    attention_coef: float
    """Of this optimizer step; settings.attention_coef with its schedule."""
    temperature: float = 1.0
    parts: Literal["all", "tokens", "attention"] = "all"
    """Terms that give a gradient and are logged."""

    @property
    def term(self) -> AttentionTerm:
        return AttentionTerm(self.settings, len(self.recorded_layers))

    @property
    def row_kind(self) -> str:
        return self.term.row_kind

    def only(self, parts: Literal["tokens", "attention"], attention_coef: Optional[float] = None) -> "RalObjective":
        """One of the terms, the attention term with another coefficient if one is given."""
        coef = self.attention_coef if attention_coef is None else attention_coef
        layers = self.recorded_layers if parts == "attention" else frozenset()
        return replace(self, parts=parts, attention_coef=coef, recorded_layers=layers)

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
        with torch.set_grad_enabled(self.attention_coef > 0 and torch.is_grad_enabled()):
            loss, metrics = self.term.loss(layer, rows, batch)
        loss = self.attention_coef * loss
        return (loss if loss.requires_grad else None), {
            **attention_metrics(rows, batch), **metrics, "loss/attention": loss.detach()}


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
