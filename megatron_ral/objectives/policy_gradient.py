"""Token losses of the GRPO family: surrogate, KL to the reference, entropy bonus."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from megatron_ral.config.loss import LossConfig
from megatron_ral.functional.aggregation import token_weights
from megatron_ral.functional.kl import kl_estimate
from megatron_ral.functional.surrogates import SURROGATES, Surrogate
from megatron_ral.objectives.base import Metrics, Term, TokenOutputs
from megatron_ral.types import RlBatch


@dataclass(frozen=True)
class PolicyGradientTerm(Term):
    """sum_t w_t [ policy_coef * surrogate_t + kl_coef * KL_t - entropy_coef * H_t ]

    w_t are the weights of `token_weights`, 1 / T by default with T the response tokens of the whole optimizer step.
    With filter_equal_rewards t runs over groups that have a signal, and T counts those alone.
    """

    settings: LossConfig

    name = "policy_gradient"
    has_token_loss = True

    def token_loss(self, outputs: TokenOutputs, batch: RlBatch) -> tuple[Tensor, Metrics]:
        settings, mask = self.settings, batch.loss_mask
        weights = token_weights(mask, settings.aggregation, **asdict(batch.totals)).to(outputs.logprobs.dtype)
        surrogate = self._surrogate(outputs.logprobs, batch, mask)

        def mean(values: Tensor) -> Tensor:
            """Return the mean over tokens, whatever the aggregation, for the log."""
            return (values.detach() * mask).sum() / batch.totals.num_tokens

        loss = (surrogate.loss * weights).sum()
        metrics = {
            "loss/policy": loss.detach(),
            "entropy": mean(outputs.entropy),
            "clip_ratio/low": mean(surrogate.clipped_low),
            "clip_ratio/high": mean(surrogate.clipped_high),
            "ratio": mean(surrogate.ratio),
        }
        # At coefficient 0 nothing of it may enter the graph: its backward pass would form gradients of all logits.
        loss = settings.policy_coef * loss if settings.policy_coef > 0 else torch.zeros_like(loss.detach())
        if batch.ref_logprobs is not None:
            kl = kl_estimate(outputs.logprobs, batch.ref_logprobs, settings.kl_estimator, value_clamp=settings.kl_clamp)
            loss = loss + settings.kl_coef * (kl * weights).sum()
            metrics["kl"] = mean(kl)
        if settings.entropy_coef > 0:
            loss = loss - settings.entropy_coef * (outputs.entropy * weights).sum()
        if batch.compares_sampler:
            metrics |= sampling_metrics(outputs.logprobs.detach(), batch)
        return loss, metrics

    def _surrogate(self, logprobs: Tensor, batch: RlBatch, mask: Tensor) -> Surrogate:
        old = logprobs.detach() if batch.is_on_policy else batch.old_logprobs
        assert old is not None  # absent from on-policy batches alone
        settings = self.settings
        return SURROGATES[settings.policy_loss](
            logprobs,
            old,
            batch.advantages,
            mask,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
        )


def sampling_metrics(logprobs_BGR: Tensor, batch: RlBatch) -> Metrics:
    """Return how far the sampler was from the training engine: mean absolute difference of log-probabilities.

    It counts all responses of the policy in a micro-batch, those of filtered groups included.
    """
    own = batch.groups.response_mask & ~batch.from_teacher[:, None, None]
    difference = (logprobs_BGR - batch.rollout_logprobs).abs().masked_fill(~own, 0.0)
    return {"sampling/logprob_difference:sum": difference.sum(), "sampling/logprob_difference:count": own.sum()}
