"""Losses as values that an engine calls back: supervised cross-entropy, and the GRPO family with the term of RAL and what a
teacher adds."""

from dataclasses import asdict, dataclass, replace
from typing import Literal, Mapping, Optional

import torch
from torch import Tensor

from megatron_ral.config.loss import LossConfig
from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.objectives.base import TokenOutputs
from megatron_ral.functional.aggregation import token_weights
from megatron_ral.functional.kl import kl_estimate
from megatron_ral.functional.surrogates import Surrogate, cispo_loss, grpo_loss, gspo_loss
from megatron_ral.objectives.attention import AttentionTerm, attention_metrics
from megatron_ral.objectives.distillation import DistillTerm
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
    """L =  sum_t w_t [ policy_coef * policy_t + kl_coef * KL_t - entropy_coef * H_t ]
         +  attention_coef * attention term  +  `DistillTerm`

    with w_t of `token_weights` (1 / T by default), T the response tokens of the whole optimizer step, and the attention
    term of `AttentionTerm`. attention_coef = 0 is GRPO, or what the settings say of its family. With
    filter_equal_rewards t runs over groups that have a signal, and T counts those alone.
    """

    settings: LossConfig
    term_layers: frozenset[int]
    """0-based layers of the attention term."""
    attention_coef: float
    """Of this optimizer step; settings.attention_coef with its schedule."""
    temperature: float = 1.0
    parts: Literal["all", "tokens", "attention", "distill_attention"] = "all"
    """Terms that give a gradient and are logged: all; all but the attention term; that alone; the teacher's attention
    alone."""
    distill: Optional[DistillTerm] = None
    """What the teacher adds."""

    @property
    def recorded_layers(self) -> frozenset[int]:
        distilled = self.distill.layers if self.distill is not None and self.parts != "attention" else frozenset()
        return distilled | (self.term_layers if self.parts in ("all", "attention") else frozenset())

    @property
    def term(self) -> AttentionTerm:
        return AttentionTerm(self.settings, len(self.term_layers))

    @property
    def row_kind(self) -> str:
        return self.term.row_kind

    def only(
        self, parts: Literal["tokens", "attention", "distill_attention"], attention_coef: Optional[float] = None
    ) -> "RalObjective":
        """Some of the terms; the attention term with another coefficient if one is given."""
        coef = self.attention_coef if attention_coef is None else attention_coef
        return replace(self, parts=parts, attention_coef=coef)

    def token_loss(self, outputs: TokenOutputs, batch: TrainBatch) -> tuple[Tensor, Metrics]:
        if self.parts in ("attention", "distill_attention"):
            return 0.0 * outputs.logprobs.sum(), {}
        settings, mask = self.settings, batch.loss_mask
        weights = token_weights(mask, settings.aggregation, **asdict(batch.totals)).to(outputs.logprobs.dtype)
        policy = self._policy_loss(outputs.logprobs, batch, mask)

        def mean(values: Tensor) -> Tensor:
            """Over tokens whatever the aggregation, for the log."""
            return (values.detach() * mask).sum() / batch.totals.num_tokens

        loss = (policy.loss * weights).sum()
        metrics = {
            "loss/policy": loss.detach(),
            "entropy": mean(outputs.entropy),
            "clip_ratio/low": mean(policy.clipped_low),
            "clip_ratio/high": mean(policy.clipped_high),
            "ratio": mean(policy.ratio),
        }
        # At coefficient 0 nothing of it may enter the graph: its backward pass would form gradients of all logits.
        loss = settings.policy_coef * loss if settings.policy_coef > 0 else torch.zeros_like(loss.detach())
        if batch.ref_logprobs is not None:
            kl = kl_estimate(outputs.logprobs, batch.ref_logprobs, settings.kl_estimator, value_clamp=settings.kl_clamp)
            loss = loss + settings.kl_coef * (kl * weights).sum()
            metrics["kl"] = mean(kl)
        if settings.entropy_coef > 0:
            loss = loss - settings.entropy_coef * (outputs.entropy * weights).sum()
        if batch.rollout_logprobs is not None:
            metrics |= sampling_metrics(outputs.logprobs.detach(), batch)
        if self.distill is not None:
            distilled, measured = self.distill.token_loss(outputs, batch)
            loss, metrics = loss + distilled, {**metrics, **measured}
        metrics["loss/token"] = loss.detach()
        return (loss if loss.requires_grad else loss + 0.0 * outputs.logprobs.sum()), metrics

    def _policy_loss(self, logprobs: Tensor, batch: TrainBatch, mask: Tensor) -> Surrogate:
        old = logprobs.detach() if batch.on_policy else batch.old_logprobs
        settings, arguments = self.settings, (logprobs, old, batch.advantages, mask)
        bounds = {"clip_low": settings.clip_low, "clip_high": settings.clip_high}
        if settings.policy_loss == "cispo":
            return cispo_loss(*arguments, **bounds)
        clipped = {"grpo": grpo_loss, "gspo": gspo_loss}[settings.policy_loss]
        return clipped(*arguments, **bounds, dual_clip=settings.dual_clip)

    def attention_loss(self, layer: int, rows: AttentionRows, batch: TrainBatch) -> tuple[Optional[Tensor], Metrics]:
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        if layer in self.term_layers and self.parts in ("all", "attention"):
            with torch.set_grad_enabled(self.attention_coef > 0 and torch.is_grad_enabled()):
                loss, measured = self.term.loss(layer, rows, batch)
            losses.append(self.attention_coef * loss)
            metrics |= {**attention_metrics(rows, batch), **measured, "loss/attention": losses[0].detach()}
        if self.distill is not None and layer in self.distill.layers and self.parts != "attention":
            loss, measured = self.distill.attention_loss(layer, rows, batch)
            losses.append(loss)
            metrics |= measured
        losses = [loss for loss in losses if loss is not None and loss.requires_grad]
        return (sum(losses[1:], losses[0]) if losses else None), metrics


def sampling_metrics(logprobs_BGR: Tensor, batch: TrainBatch) -> Metrics:
    """How far the sampler was from the training engine, over all responses of a micro-batch that are the policy's, filtered
    groups included."""
    own = batch.groups.response_mask
    if batch.from_teacher is not None:
        own = own & ~batch.from_teacher[:, None, None]
    difference = (logprobs_BGR - batch.rollout_logprobs).abs().masked_fill(~own, 0.0)
    return {"sampling/logprob_difference:sum": difference.sum(), "sampling/logprob_difference:count": own.sum()}


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
