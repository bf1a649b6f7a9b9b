"""Group-relative advantages."""

import torch
from torch import Tensor


def group_advantages(rewards_BG: Tensor, eps: float = 1e-6) -> Tensor:
    """Standardise rewards inside each group.

        A[b, g] = (r[b, g] - mean_g r[b]) / (std_g r[b] + eps)          std with Bessel's correction (ddof = 1)

    Args:
        rewards_BG: rewards, float, [B, G], G >= 2.
        eps: added to the standard deviation. verl uses 1e-6, TRL 1e-4; both use ddof = 1.

    Returns:
        [B, G] float32; a group whose rewards are all equal gets exactly 0 (no signal). No gradient.

    Raises:
        ValueError: G < 2, where no baseline exists.

    Source: RAL paper eq. (8); GRPO (arXiv 2402.03300).
    """
    if rewards_BG.dim() != 2 or rewards_BG.shape[1] < 2:
        raise ValueError(f"rewards must be [B, G] with G >= 2, got {tuple(rewards_BG.shape)}")
    rewards = rewards_BG.detach().double()
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    # Equal rewards must give exactly zero although a mean in floating point may be off by one ulp.
    signal = rewards.max(dim=1, keepdim=True).values > rewards.min(dim=1, keepdim=True).values
    advantages = centred / (rewards.std(dim=1, keepdim=True) + eps)
    return torch.where(signal, advantages, torch.zeros_like(advantages)).float()
