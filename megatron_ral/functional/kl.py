"""Per-token estimators of KL(policy || reference) from samples of the policy."""

import torch
from torch import Tensor


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor, log_ratio_clamp: float = 20.0) -> Tensor:
    """Schulman's k3 estimator, non-negative and unbiased in value.

        k3 = exp(d) - d - 1,   d = ref_logprobs - logprobs

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy, any shape; carries gradient.
        ref_logprobs: the same under the reference; no gradient taken.
        log_ratio_clamp: d is clamped to +- this value (20 as in verl; TRL does not clamp).

    Returns:
        Same shape as `logprobs`, >= 0.

    Source: http://joschu.net/blog/kl-approx.html; GRPO (arXiv 2402.03300) eq. (4).
    """
    difference = (ref_logprobs.detach() - logprobs).clamp(-log_ratio_clamp, log_ratio_clamp)
    return torch.expm1(difference) - difference
