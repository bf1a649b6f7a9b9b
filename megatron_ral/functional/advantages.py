"""Group-relative advantages."""

import torch
from torch import Tensor


def group_advantages(rewards_BG: Tensor, eps: float = 1e-6, scale: str = "std") -> Tensor:
    """Return rewards relative to the other rewards of their group.

        std     A[b, g] = (r[b, g] - mean_g r[b]) / (std_g r[b] + eps)      std with Bessel's correction (ddof = 1)
        none    A[b, g] =  r[b, g] - mean_g r[b]

    Args:
        rewards_BG: rewards, float, [B, G], G >= 2.
        eps: added to the standard deviation. verl uses 1e-6, TRL 1e-4; both use ddof = 1.
        scale: "std" (GRPO) or "none" (Dr. GRPO, because dividing by the standard deviation favours questions that are
            too easy or too hard).

    Returns:
        [B, G] float32. A group whose rewards are all equal gets exactly 0. No gradient.

    Raises:
        ValueError: G < 2, where no baseline exists, or an unknown scale.

    Source: RAL paper eq. (8); GRPO (arXiv 2402.03300); "none": Dr. GRPO (arXiv 2503.20783) section 3.2.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"advantage scale '{scale}' is not one of std, none")
    signal = has_signal(rewards_BG)[:, None]
    rewards = rewards_BG.detach().double()
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "std":
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + eps)
    # The mean in floating point may be off by one ulp, but equal rewards must give exactly zero.
    return torch.where(signal, advantages, torch.zeros_like(advantages)).float()


def is_right(accuracy: Tensor) -> Tensor:
    """Return which responses are right: those whose accuracy is at least one half, bool of the same shape.

    Args:
        accuracy: Accuracy part of the rewards, float in [0, 1]. The format is left out, because noise and temperature
            change it too.
    """
    return accuracy >= 0.5


def has_signal(rewards_BG: Tensor) -> Tensor:
    """Return which groups have rewards that are not all equal.

    A group of equal rewards has no advantage under any estimator.

    Args:
        rewards_BG: rewards, float, [B, G], G >= 2.

    Returns:
        [B] bool, True where a group has a learning signal.

    Raises:
        ValueError: G < 2, where no baseline exists.

    Source: the condition of DAPO's dynamic sampling (arXiv 2503.14476) section 3.2, eq. (11).
    """
    if rewards_BG.dim() != 2 or rewards_BG.shape[1] < 2:
        raise ValueError(f"rewards must be [B, G] with G >= 2, got {tuple(rewards_BG.shape)}")
    return rewards_BG.max(dim=1).values > rewards_BG.min(dim=1).values
