"""Importance weights of responses that were drawn by another engine than the one that trains.

A sampler rounds otherwise than the training engine, or holds other weights, so that responses come from mu and not from
the policy p_old that their surrogate assumes. The weight p_old / mu of a token or a response corrects for this. It is
bounded, because its variance is not.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CorrectionMode = Literal["token_truncate", "sequence_mask"]

LOG_RATIO_BOUND = 20.0
"""Upper bound of log(p_old / mu) (verl's), beyond every bound on a weight, so that the mean of ratios stays finite."""


@dataclass(frozen=True)
class SamplerCorrection:
    """Weights of the tokens of a micro-batch, without gradient."""

    weights: Tensor
    """Factor of each token's surrogate, [B, G, R]; 1 at padding."""
    ratios: Tensor
    """p_old / mu before it is bounded: of each token [B, G, R] with `token_truncate`, of each response [B, G, 1] with
    `sequence_mask`. 1 where nothing counts."""
    is_cut: Tensor
    """Mask of the ratios above the cap, of the shape of `ratios`."""
    counts: Tensor
    """Mask of the ratios that count, of the shape of `ratios`."""


def sampler_correction(
    logprobs_BGR: Tensor, sampler_logprobs_BGR: Tensor, mask_BGR: Tensor, mode: CorrectionMode, cap: float
) -> SamplerCorrection:
    """Return importance weights of the training engine's policy against the sampler.

        token_truncate   w_t = min(exp(logprobs_t - sampler_t), cap)
        sequence_mask    w_t = s if s <= cap else 0,   s = exp(sum_t (logprobs_t - sampler_t))     over the response

    Args:
        logprobs_BGR: log-probabilities of the sampled tokens under the rollout policy by the training engine (p_old),
            float.
        sampler_logprobs_BGR: log-probabilities of the same tokens under the sampler, float, at the same temperature and
            over the same vocabulary. Padding may hold anything.
        mask_BGR: bool, True at the tokens that count.
        mode: one of the two names above.
        cap: bound on the weight, 1 < cap <= 1e6.

    Raises:
        ValueError: unknown mode.

    Source: truncated importance sampling of the sampler (https://fengyao.notion.site/off-policy-rl), masked sequences
    (https://richardli.xyz/rl-collapse); the formulas of TRL (`vllm_importance_sampling_mode`) and verl (`rollout_is`),
    cited by file and commit in `tests/unit/test_published_losses.py`.
    """
    difference = (logprobs_BGR.detach() - sampler_logprobs_BGR.detach()).masked_fill(~mask_BGR, 0.0)
    if mode == "token_truncate":
        ratios, counts = difference.clamp(max=LOG_RATIO_BOUND).exp(), mask_BGR
        weights = ratios.clamp(max=cap)
    elif mode == "sequence_mask":
        ratios = difference.sum(dim=-1, keepdim=True).clamp(max=LOG_RATIO_BOUND).exp()
        counts = mask_BGR.any(dim=-1, keepdim=True)
        weights = torch.where(mask_BGR, ratios.masked_fill(ratios > cap, 0.0), 1.0)
    else:
        raise ValueError(f"correction mode '{mode}' is not one of token_truncate, sequence_mask")
    return SamplerCorrection(weights, ratios, (ratios > cap) & counts, counts)
