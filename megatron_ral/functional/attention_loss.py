"""The attention term of RAL, per row: weighting and normalising is the caller's."""

from torch import Tensor

from megatron_ral.functional.divergence import jensen_shannon


def attention_rl_loss(policy_BGRS: Tensor, target_BGRS: Tensor, advantages_BG: Tensor) -> tuple[Tensor, Tensor]:
    """Advantage-weighted divergence of the attention policy from its target, a loss to be *minimised*.

        loss[b, g, r] = A[b, g] * JSD(p_theta[b, g, r] || p_target[b, g, r])

    A > 0 pulls the row towards the target, A < 0 pushes it away. With target `old` value and gradient are exactly
    zero at theta = theta_old: one optimizer step per rollout makes RAL identical to GRPO.

    Args:
        policy_BGRS: attention policy of this forward pass; carries gradient.
        target_BGRS: target distributions (old or reference policy); constant.
        advantages_BG: group-relative advantages; constant.

    Returns:
        (loss_BGR, divergence_BGR); the divergence is detached.

    Source: RAL paper (arXiv 2602.04884) eq. (3).
    """
    divergence = jensen_shannon(policy_BGRS, target_BGRS)
    return advantages_BG.detach()[:, :, None] * divergence, divergence.detach()
