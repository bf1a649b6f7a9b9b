"""Targets made of the successful responses of a group: where did those that got it right look?

Causality gives all responses of a prompt the same prompt keys, so that their rows can be compared over these.
"""

import torch
from torch import Tensor


def mean_prompt_row(policy_BGRS: Tensor, mask_BGR: Tensor, prompt_length: int) -> Tensor:
    """Each response's attention policy over the prompt, averaged over its rows.

    Args:
        policy_BGRS: policies over prompt keys (mass on other keys 0).
        mask_BGR: bool, real response tokens.
        prompt_length: P, the first columns.

    Returns:
        [B, G, P]; zeros for a response without rows. No gradient.
    """
    weights = mask_BGR.to(policy_BGRS.dtype)
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1.0)
    return torch.einsum("bgr,bgrp->bgp", weights, policy_BGRS.detach()[..., :prompt_length])


def success_target(rows_BGP: Tensor, advantages_BG: Tensor) -> Tensor:
    """Advantage-weighted mean of the successful responses' rows.

        target[b] = sum_{g: A > 0} A[b, g] row[b, g] / sum_{g: A > 0} A[b, g]

    Args:
        rows_BGP: `mean_prompt_row`.
        advantages_BG: group-relative advantages.

    Returns:
        [B, P]; zeros for a group without a positive advantage. No gradient.
    """
    success = advantages_BG.clamp(min=0).to(rows_BGP.dtype)
    total = success.sum(dim=1, keepdim=True)
    return torch.einsum("bg,bgp->bp", success / torch.where(total > 0, total, 1.0), rows_BGP.detach())
