"""Estimators of KL(policy || reference), one value per token, from tokens that the policy sampled."""

import torch
from torch import Tensor


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, kind: str, *, log_ratio_clamp: float = 20.0, value_clamp: float = 0.0
) -> Tensor:
    """Return Schulman's estimate of the KL divergence at every token.

        d = ref_logprobs - logprobs
        k2 = d^2 / 2                 value >= 0, biased
        k3 = exp(d) - d - 1          value >= 0, unbiased

    Value and gradient differ: as a term of a loss, on policy, k2 has the expected gradient of KL(policy || reference)
    and k3 has that of KL(reference || policy). Schulman's k1 = -d is left out because its expected gradient is zero.

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy, any shape; carries gradient.
        ref_logprobs: log-probabilities of the same tokens under the reference; no gradient.
        kind: "k2" or "k3".
        log_ratio_clamp: bound of |d|, beyond which there is no gradient (verl: 20, for k3 alone; TRL: none).
        value_clamp: bound of the estimate, beyond which there is no gradient (verl: 10 for k3); 0 for no bound.

    Returns:
        Estimate in nats with the shape of `logprobs`; carries gradient to `logprobs`.

    Raises:
        ValueError: unknown kind.

    Source: http://joschu.net/blog/kl-approx.html; k3 in GRPO (arXiv 2402.03300) eq. (4); gradients derived here.
    """
    difference = (ref_logprobs.detach() - logprobs).clamp(-log_ratio_clamp, log_ratio_clamp)
    if kind == "k2":
        estimate = difference.square() / 2
    elif kind == "k3":
        estimate = torch.expm1(difference) - difference
    else:
        raise ValueError(f"KL estimator '{kind}' is not one of k2, k3")
    return estimate.clamp(-value_clamp, value_clamp) if value_clamp > 0.0 else estimate
