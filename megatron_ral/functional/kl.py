"""Per-token estimators of KL(policy || reference) from samples of the policy."""

import torch
from torch import Tensor


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, kind: str, *, log_ratio_clamp: float = 20.0, value_clamp: float = 0.0
) -> Tensor:
    """Schulman's estimators.

        d = ref_logprobs - logprobs
        k1 = -d                      unbiased, of either sign
        k2 = d^2 / 2                 >= 0, biased
        k3 = exp(d) - d - 1          >= 0, unbiased

    That is of the values. As a term of a loss, on policy, k2 has the expected gradient of KL(policy || reference), k3
    that of KL(reference || policy), and k1 zero: it measures, but does not hold the policy back.

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy, any shape; carries gradient.
        ref_logprobs: the same under the reference; no gradient taken.
        kind: "k1", "k2" or "k3".
        log_ratio_clamp: d is clamped to +- this value, beyond it no gradient (verl: 20, for k3 alone; TRL: none).
        value_clamp: the estimate is clamped to +- this value, beyond it no gradient (verl: 10 for k3); 0: none.

    Returns:
        Same shape as `logprobs`.

    Raises:
        ValueError: unknown kind.

    Source: http://joschu.net/blog/kl-approx.html; k3 in GRPO (arXiv 2402.03300) eq. (4); gradients derived here.
    """
    difference = (ref_logprobs.detach() - logprobs).clamp(-log_ratio_clamp, log_ratio_clamp)
    if kind == "k1":
        estimate = -difference
    elif kind == "k2":
        estimate = difference.square() / 2
    elif kind == "k3":
        estimate = torch.expm1(difference) - difference
    else:
        raise ValueError(f"KL estimator '{kind}' is none of k1, k2, k3")
    return estimate.clamp(-value_clamp, value_clamp) if value_clamp > 0.0 else estimate
