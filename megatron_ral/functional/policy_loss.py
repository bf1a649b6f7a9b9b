"""Policy-gradient losses, one value per token; what the values are summed with is `aggregation.token_weights`.

`grpo_loss`, `gspo_loss` and `cispo_loss` are called alike. Padding is left out of every ratio and every flag, whatever
its log-probabilities hold, and passes no gradient on; the value of `loss` there means nothing (its weight is 0).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surrogate:
    """Per-token results, all [B, G, R]."""

    loss: Tensor
    """To be minimised; carries gradient to the log-probabilities."""
    clipped_low: Tensor
    """bool: the lower bound acted. GRPO, GSPO: ratio below 1 - clip_low with A < 0, the token gives no gradient.
    CISPO: ratio below 1 - clip_low, the bound is the token's weight."""
    clipped_high: Tensor
    """bool: an upper bound acted. GRPO, GSPO: ratio above 1 + clip_high with A > 0, or above dual_clip with A < 0, the
    token gives no gradient. CISPO: ratio above 1 + clip_high, the bound is the token's weight."""
    ratio: Tensor
    """Importance ratio before clipping (GSPO: of the whole sequence, at each of its tokens), detached; 1 at padding."""


def grpo_loss(
    logprobs_BGR: Tensor,
    old_logprobs_BGR: Tensor,
    advantages_BG: Tensor,
    mask_BGR: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
    log_ratio_clamp: float = 20.0,
) -> Surrogate:
    """PPO's clipped surrogate with the group-relative advantages of GRPO.

        loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A),   r = exp(logprobs - old_logprobs)
        with dual_clip > 0 and A < 0:   loss = min(loss, -dual_clip A)

    Args:
        logprobs_BGR: log-probabilities of the sampled tokens under the policy, float; carries gradient.
        old_logprobs_BGR: the same under the policy that made the rollout, from the *training* engine; no gradient.
        advantages_BG: float; no gradient.
        mask_BGR: bool, True at real response tokens.
        clip_low, clip_high: > 0. DAPO's "clip higher" is clip_high > clip_low.
        dual_clip: bound on r where A < 0, > 1 (verl: 3); 0: none.
        log_ratio_clamp: log r is clamped to +- this value (20 as in verl; TRL does not clamp), beyond it no gradient.

    Raises:
        ValueError: 0 < dual_clip <= 1.

    Source: PPO (arXiv 1707.06347) eq. (7), GRPO (arXiv 2402.03300) eq. (3), dual-clip PPO (arXiv 1912.09729); the sign
    makes it a loss.
    """
    log_ratio = _log_ratio(logprobs_BGR, old_logprobs_BGR, mask_BGR)
    return _clipped_surrogate(
        log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp).exp(), advantages_BG, clip_low, clip_high, dual_clip
    )


def gspo_loss(
    logprobs_BGR: Tensor,
    old_logprobs_BGR: Tensor,
    advantages_BG: Tensor,
    mask_BGR: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
    log_ratio_clamp: float = 20.0,
) -> Surrogate:
    """Clipped surrogate with the importance ratio of the whole response (its geometric mean over tokens).

        s   = exp(mean_t (logprobs_t - old_logprobs_t))                     over the response's real tokens
        s_t = sg[s] exp(logprobs_t - sg[logprobs_t])                        sg: stop-gradient
        loss_t = -min(s_t A, clip(s_t, 1 - clip_low, 1 + clip_high) A)

    Every s_t has the value of s, and token t alone gets the gradient of s_t. Summed with weights that are equal inside
    a response (all modes of `token_weights` are), value and gradient are those of the sequence objective
    -min(s A, clip(s) A); with `sequence_mean` each response then counts once, which is the paper's objective. verl
    writes the same in log space: log s_t = sg[log s] + logprobs_t - sg[logprobs_t]. TRL lets s itself carry the
    gradient: the loss of one token then has another gradient, their sum the same.

    Args: as `grpo_loss`, but a ratio that is a mean needs far narrower bounds (the paper: 3e-4 and 4e-4). The clamp
        acts on log s (verl: 10, from above). The paper and verl have no dual clip.

    Raises:
        ValueError: 0 < dual_clip <= 1.

    Source: GSPO (arXiv 2507.18071) eq. (5), (7); token form: GSPO-token, eq. (13), (14); bounds: section 5.1.
    """
    log_ratio = _log_ratio(logprobs_BGR, old_logprobs_BGR, mask_BGR)
    lengths = mask_BGR.sum(dim=-1, keepdim=True).clamp(min=1)
    of_sequence = log_ratio.detach().sum(dim=-1, keepdim=True) / lengths
    log_ratio = torch.where(mask_BGR, of_sequence + (log_ratio - log_ratio.detach()), 0.0)
    return _clipped_surrogate(
        log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp).exp(), advantages_BG, clip_low, clip_high, dual_clip
    )


def cispo_loss(
    logprobs_BGR: Tensor,
    old_logprobs_BGR: Tensor,
    advantages_BG: Tensor,
    mask_BGR: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    log_ratio_clamp: float = 20.0,
) -> Surrogate:
    """Log-likelihood weighted by the clipped importance ratio: every token keeps its gradient, a ratio only its size.

        loss = -sg[clip(r, 1 - clip_low, 1 + clip_high)] A logprobs,   r = exp(logprobs - old_logprobs)

    The value is no surrogate of the return, only the gradient means something.

    Args: as `grpo_loss`, and
        clip_low: 1 or more: no lower bound (the paper's runs and TRL).
        clip_high: > 0. TRL gives the bound itself, here it is that - 1: its epsilon_high = 5 is clip_high = 4.
            verl's two-sided 1 - clip_ratio_low, 1 + clip_ratio_high are taken over as they are.

    Source: CISPO in MiniMax-M1 (arXiv 2506.13585) eq. (4), (5).
    """
    log_ratio = _log_ratio(logprobs_BGR, old_logprobs_BGR, mask_BGR).detach()
    ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp).exp()
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages_BG.detach()[..., None]
    loss = -weight * logprobs_BGR.masked_fill(~mask_BGR, 0.0)
    return Surrogate(loss, ratio < 1.0 - clip_low, ratio > 1.0 + clip_high, ratio)


def _log_ratio(logprobs_BGR: Tensor, old_logprobs_BGR: Tensor, mask_BGR: Tensor) -> Tensor:
    """logprobs - old_logprobs, 0 without gradient at padding."""
    return (logprobs_BGR - old_logprobs_BGR.detach()).masked_fill(~mask_BGR, 0.0)


def _clipped_surrogate(
    ratio_BGR: Tensor, advantages_BG: Tensor, clip_low: float, clip_high: float, dual_clip: float
) -> Surrogate:
    if 0.0 < dual_clip <= 1.0:
        raise ValueError(f"dual_clip = {dual_clip} must be 0 (off) or more than 1")
    advantages = advantages_BG.detach()[..., None]
    clipped = ratio_BGR.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -torch.minimum(ratio_BGR * advantages, clipped * advantages)
    ratio = ratio_BGR.detach()
    clipped_low = (ratio < 1.0 - clip_low) & (advantages < 0)
    clipped_high = (ratio > 1.0 + clip_high) & (advantages > 0)
    if dual_clip > 0.0:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
        clipped_high = clipped_high | (ratio > dual_clip) & (advantages < 0)
    return Surrogate(loss, clipped_low, clipped_high, ratio)
