"""Token losses of the GRPO family: surrogate, KL to the reference, entropy bonus."""

from dataclasses import asdict, dataclass
from typing import Optional

import torch
from torch import Tensor

from megatron_ral.config.loss import LossConfig
from megatron_ral.functional.aggregation import token_weights
from megatron_ral.functional.kl import kl_estimate
from megatron_ral.functional.sampler_correction import SamplerCorrection, sampler_correction
from megatron_ral.functional.surrogates import SURROGATES, Surrogate
from megatron_ral.objectives.base import Metrics, Term, TokenOutputs
from megatron_ral.types import RlBatch


@dataclass(frozen=True)
class PolicyGradientTerm(Term):
    """sum_t w_t [ policy_coef * c_t * surrogate_t + kl_coef * KL_t - entropy_coef * H_t ]

    w_t are the weights of `token_weights`, 1 / T by default with T the response tokens of the whole optimizer step.
    With filter_equal_rewards t runs over groups that have a signal, and T counts those alone. c_t are the weights of
    `sampler_correction`, absent by default.
    """

    settings: LossConfig

    name = "policy_gradient"
    has_token_loss = True

    def token_loss(self, outputs: TokenOutputs, batch: RlBatch) -> tuple[Tensor, Metrics]:
        settings, mask = self.settings, batch.loss_mask
        weights = token_weights(mask, settings.aggregation, **asdict(batch.totals)).to(outputs.logprobs.dtype)
        old = self._old_logprobs(outputs.logprobs, batch)
        surrogate = self._surrogate(outputs.logprobs, old, batch, mask)

        def mean(values: Tensor) -> Tensor:
            """Return the mean over tokens, whatever the aggregation, for the log."""
            return (values.detach() * mask).sum() / batch.totals.num_tokens

        correction = self._correction(old, batch, mask)
        policy_weights = weights if correction is None else weights * correction.weights
        loss = (surrogate.loss * policy_weights).sum()
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
        if correction is not None:
            metrics |= correction_metrics(correction)
        if batch.compares_sampler:
            metrics |= sampling_metrics(outputs.logprobs.detach(), batch)
        return loss, metrics

    def _old_logprobs(self, logprobs: Tensor, batch: RlBatch) -> Tensor:
        """Return the rollout policy's log-probabilities by the training engine, without gradient."""
        old = logprobs.detach() if batch.is_on_policy else batch.old_logprobs
        assert old is not None  # absent from on-policy batches alone
        return old

    def _correction(self, old: Tensor, batch: RlBatch, mask: Tensor) -> Optional[SamplerCorrection]:
        """Return the importance weights against the sampler. None: the setting is off or there is no policy loss."""
        settings = self.settings
        if settings.sampler_correction == "none" or settings.policy_coef == 0:
            return None
        return sampler_correction(
            old, batch.rollout_logprobs, mask, settings.sampler_correction, settings.sampler_correction_cap
        )

    def _surrogate(self, logprobs: Tensor, old: Tensor, batch: RlBatch, mask: Tensor) -> Surrogate:
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


def correction_metrics(correction: SamplerCorrection) -> Metrics:
    """Return mean and largest ratio of training engine to sampler before it is bounded, and the share above the cap.

    They are of tokens or of responses, as the mode has it, over the groups that count.
    """
    ratios, counts = correction.ratios, correction.counts
    number = counts.sum()
    return {
        "sampling/ratio_mean:sum": ratios.masked_fill(~counts, 0.0).sum(),
        "sampling/ratio_mean:count": number,
        "sampling/ratio_cut:sum": correction.is_cut.sum(),
        "sampling/ratio_cut:count": number,
        "sampling/ratio_max:max": ratios.masked_fill(~counts, 0.0).amax(),
    }
