"""Target `contrast`: where the right responses of a prompt looked and the wrong ones did not.

    loss = - sum over responses g and rows t of w_g sum_k q_g(t, k) log p_g(t, k)
    w_g  = 1 / (number of right responses) for right ones, - 1 / (number of wrong responses) for wrong ones

with q the rows that decoding recorded under each response's own noise and p the current ones, both over visual keys.
Groups with right responses alone, or with wrong ones alone, have weight 0. A response is right if the accuracy part of
its reward is at least one half, because noise and temperature change the format too. Source: this project.
"""

import torch
from torch import Tensor

from megatron_ral.attention.targets.explored import ExploredTarget
from megatron_ral.functional.advantages import is_right


class ContrastTarget(ExploredTarget):
    """Explored rows, weighted by success against failure within the group."""

    divergence = "cross_entropy"

    def response_weights(self, advantages_BG: Tensor, rewards_BG: Tensor, accuracy_BG: Tensor) -> Tensor:
        return contrast_weights(is_right(accuracy_BG)).to(advantages_BG)


def contrast_weights(is_right_BG: Tensor) -> Tensor:
    """Return 1 / (right responses) at right ones, -1 / (wrong responses) at wrong ones, 0 in groups of one kind.

    Args:
        is_right_BG: Mask of the right responses, bool.

    Returns:
        [B, G] float32.
    """
    right, wrong = is_right_BG.float(), (~is_right_BG).float()
    num_right, num_wrong = right.sum(dim=1, keepdim=True), wrong.sum(dim=1, keepdim=True)
    weights = right / num_right.clamp(min=1) - wrong / num_wrong.clamp(min=1)
    return torch.where((num_right > 0) & (num_wrong > 0), weights, 0.0)


TARGET = ContrastTarget()
