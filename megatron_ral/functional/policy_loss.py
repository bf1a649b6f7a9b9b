"""Token-level policy-gradient losses, per token: weighting and normalising is the caller's."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """Per-token results, all of the shape of the log-probabilities."""

    loss: Tensor
    """To be minimised; carries gradient."""
    clipped_low: Tensor
    """bool: the ratio fell below 1 - clip_low with A < 0, so that the token gives no gradient."""
    clipped_high: Tensor
    """bool: the ratio rose above 1 + clip_high with A > 0, so that the token gives no gradient."""
    ratio: Tensor
    """exp(logprobs - old_logprobs), detached."""


def clipped_surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float,
                      clip_high: float, log_ratio_clamp: float = 20.0) -> PolicyLoss:
    """PPO's clipped surrogate with the group-relative advantages of GRPO.

        loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A),   r = exp(logprobs - old_logprobs)

    Args:
        logprobs: [B, G, R] log-probabilities under the policy; carries gradient.
        old_logprobs: [B, G, R] under the policy that made the rollout, from the *training* engine; detached.
        advantages: broadcastable to [B, G, R].
        clip_low, clip_high: > 0.
        log_ratio_clamp: log r is clamped to +- this value (20 as in verl).

    Source: PPO (arXiv 1707.06347) eq. (7); the sign makes it a loss.
    """
    ratio = (logprobs - old_logprobs.detach()).clamp(-log_ratio_clamp, log_ratio_clamp).exp()
    advantages = advantages.detach()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    with torch.no_grad():
        clipped_low = (ratio < 1.0 - clip_low) & (advantages < 0)
        clipped_high = (ratio > 1.0 + clip_high) & (advantages > 0)
    return PolicyLoss(loss, clipped_low, clipped_high, ratio.detach())
