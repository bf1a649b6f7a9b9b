"""Surrogates of the policy gradient: token losses of the GRPO family, one value per token.

`SURROGATES` names them as `loss.policy_loss` does, and all are called alike (`TokenLoss`). Their values are summed with
the weights of `aggregation.token_weights`. Padding enters no ratio and no flag, whatever its log-probabilities hold,
and carries no gradient. The value of the loss at padding has no meaning, because its weight is 0.

A new token loss is one function here with its row in `SURROGATES`, and its name in `config/loss.py`.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Mapping, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surrogate:
    """Results of one token loss, all [B, G, R]."""

    loss: Tensor
    """Loss of every token; carries gradient to the log-probabilities."""
    clipped_low: Tensor
    """Tokens at which the lower bound acted, bool. GRPO, GSPO: ratio below 1 - clip_low with A < 0, no gradient. CISPO:
    ratio below 1 - clip_low, where the bound is the token's weight."""
    clipped_high: Tensor
    """Tokens at which an upper bound acted, bool. GRPO, GSPO: ratio above 1 + clip_high with A > 0, or above dual_clip
    with A < 0, no gradient. CISPO: ratio above 1 + clip_high, where the bound is the token's weight."""
    ratio: Tensor
    """Importance ratio before clipping, without gradient; 1 at padding. GSPO: ratio of the response, at each token."""


class TokenLoss(Protocol):
    """Function from log-probabilities and advantages to a surrogate."""

    def __call__(
        self,
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
        """Return the surrogate of every token. Arguments: see `grpo_loss`."""
        ...


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
    """Return PPO's clipped surrogate with the group-relative advantages of GRPO.

        loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A),   r = exp(logprobs - old_logprobs)
        with dual_clip > 0 and A < 0:   loss = min(loss, -dual_clip A)

    Args:
        logprobs_BGR: log-probabilities of the sampled tokens under the policy, float; carries gradient.
        old_logprobs_BGR: log-probabilities of the same tokens under the policy that made the rollout, computed by the
            *training* engine; no gradient.
        advantages_BG: advantages, float; no gradient.
        mask_BGR: bool, True at real response tokens.
        clip_low, clip_high: distances of the bounds from 1, > 0. DAPO's "clip higher" is clip_high > clip_low.
        dual_clip: bound on r where A < 0, > 1 (verl: 3); 0 for no bound.
        log_ratio_clamp: bound of |log r| (20 as in verl; TRL does not clamp), beyond which there is no gradient.

    Raises:
        ValueError: 0 < dual_clip <= 1.

    Source: PPO (arXiv 1707.06347) eq. (7), GRPO (arXiv 2402.03300) eq. (3), dual-clip PPO (arXiv 1912.09729), with the
    sign of a loss.
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
    """Return the clipped surrogate with the importance ratio of the whole response, its geometric mean over tokens.

        s   = exp(mean_t (logprobs_t - old_logprobs_t))                     over the response's real tokens
        s_t = sg[s] exp(logprobs_t - sg[logprobs_t])                        sg: stop-gradient
        loss_t = -min(s_t A, clip(s_t, 1 - clip_low, 1 + clip_high) A)

    Every s_t has the value of s, and only token t gets the gradient of s_t. The weights of `token_weights` are equal
    inside a response in all modes, so that value and gradient of the sum are those of the sequence objective
    -min(s A, clip(s) A). With `sequence_mean` each response counts once, which is the paper's objective. verl writes
    the same in log space: log s_t = sg[log s] + logprobs_t - sg[logprobs_t]. In TRL s itself carries the gradient: one
    token's loss then has another gradient, but the sum over tokens has the same.

    Args: the arguments of `grpo_loss`. A ratio that is a mean needs far narrower bounds (the paper: 3e-4 and 4e-4).
        log_ratio_clamp acts on log s (verl: 10, from above). The paper and verl have no dual clip.

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
    dual_clip: float = 0.0,
    log_ratio_clamp: float = 20.0,
) -> Surrogate:
    """Return the log-likelihood weighted by the clipped importance ratio.

    Every token has a gradient, because a clipped ratio changes the size of the gradient only.

        loss = -sg[clip(r, 1 - clip_low, 1 + clip_high)] A logprobs,   r = exp(logprobs - old_logprobs)

    Only the gradient has a meaning: the value is no surrogate of the return.

    Args: the arguments of `grpo_loss`, with these differences.
        clip_low: 1 or more for no lower bound (the paper's runs and TRL).
        clip_high: > 0. TRL's epsilon_high is the bound itself, 1 + clip_high: epsilon_high = 5 is clip_high = 4.
            verl's two-sided 1 - clip_ratio_low and 1 + clip_ratio_high have the same meaning as here.
        dual_clip: 0. The loss has no second bound; the argument exists so that all token losses are called alike.

    Raises:
        ValueError: dual_clip other than 0.

    Source: CISPO in MiniMax-M1 (arXiv 2506.13585) eq. (4), (5).
    """
    if dual_clip != 0.0:
        raise ValueError(f"dual_clip = {dual_clip} has no meaning for CISPO and must be 0")
    log_ratio = _log_ratio(logprobs_BGR, old_logprobs_BGR, mask_BGR).detach()
    ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp).exp()
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages_BG.detach()[..., None]
    loss = -weight * logprobs_BGR.masked_fill(~mask_BGR, 0.0)
    return Surrogate(loss, ratio < 1.0 - clip_low, ratio > 1.0 + clip_high, ratio)


def _log_ratio(logprobs_BGR: Tensor, old_logprobs_BGR: Tensor, mask_BGR: Tensor) -> Tensor:
    """Return logprobs - old_logprobs, and 0 without gradient at padding."""
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


SURROGATES: Mapping[str, TokenLoss] = MappingProxyType({"grpo": grpo_loss, "gspo": gspo_loss, "cispo": cispo_loss})
"""Token losses by the value of `loss.policy_loss`."""
