"""Where rows look: masses of the attention policy, and how spread out it is."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ral.attention.rows import RowKeys, key_mass, pieces, distribution_part


@dataclass(frozen=True)
class RowMass:
    """Per row, all [B, G, R], without gradient."""

    visual: Tensor
    """Mass on all visual tokens of the prompt."""
    prompt: Tensor
    """Mass on the prompt, visual tokens included."""
    sink: Tensor
    """Mass on the first token."""
    target_share: Tensor
    """Mass on the annotated cells divided by the mass on all visual tokens; 0 where there is none."""
    entropy: Tensor
    """Entropy of the policy in nats."""


@torch.no_grad()
def row_mass(attention_BGRS: Tensor, keys: RowKeys, visual_mask_BP: Tensor, target_mask_BP: Tensor) -> RowMass:
    """Masses of every row's policy.

    Args:
        attention_BGRS: head-averaged attention; the first P columns are the prompt.
        keys: keys the policy is made of.
        visual_mask_BP: bool, visual tokens.
        target_mask_BP: bool, visual tokens of annotated cells.
    """
    P, mass = visual_mask_BP.shape[1], key_mass(attention_BGRS, keys)
    visual, prompt, sink, target, entropy = (attention_BGRS.new_empty(attention_BGRS.shape[:3]) for _ in range(5))
    for piece in pieces(attention_BGRS.shape[:3], attention_BGRS.shape[3]):
        policy = distribution_part(attention_BGRS, mass, keys, piece)
        over_prompt, b = policy[..., :P], piece[0]
        visual[piece] = (over_prompt * visual_mask_BP[b, None, None]).sum(-1)
        target[piece] = (over_prompt * target_mask_BP[b, None, None]).sum(-1)
        prompt[piece], sink[piece] = over_prompt.sum(-1), policy[..., 0]
        entropy[piece] = -torch.xlogy(policy, policy).sum(-1)
    return RowMass(
        visual, prompt, sink, torch.where(visual > 0, target / torch.where(visual > 0, visual, 1.0), 0.0), entropy
    )
