"""Where response rows look: masses of the attention policy on visual tokens and on annotated cells."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowMass:
    """Per response row, all [B, G, R], without gradient."""

    visual: Tensor
    """Mass on all visual tokens of the prompt."""
    target_share: Tensor
    """Mass on the annotated cells divided by the mass on all visual tokens; 0 where there is none."""
    annotated: Tensor
    """bool: a real response row of a prompt with an annotation, over which `target_share` may be averaged."""


@torch.no_grad()
def row_mass(policy_BGRS: Tensor, visual_mask_BP: Tensor, target_mask_BP: Tensor, response_mask_BGR: Tensor) -> RowMass:
    """Masses of every row.

    Args:
        policy_BGRS: attention policy, rows summing to 1; the first P columns are the prompt.
        visual_mask_BP: bool, visual tokens.
        target_mask_BP: bool, visual tokens of annotated cells.
        response_mask_BGR: bool, real response tokens.
    """
    prompt = policy_BGRS[..., : visual_mask_BP.shape[1]]
    visual = (prompt * visual_mask_BP[:, None, None]).sum(-1)
    target = (prompt * target_mask_BP[:, None, None]).sum(-1)
    share = torch.where(visual > 0, target / torch.where(visual > 0, visual, 1.0), 0.0)
    return RowMass(visual, share, response_mask_BGR & target_mask_BP.any(-1)[:, None, None])
