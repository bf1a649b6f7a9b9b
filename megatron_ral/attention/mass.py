"""Masses of attention distributions on parts of the input, and their entropy."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ral.attention import blocks
from megatron_ral.attention.distribution import distribution_block, key_mass
from megatron_ral.attention.types import RowKeys


@dataclass(frozen=True)
class RowMass:
    """Masses of each row's distribution, all [B, G, R], without gradient."""

    visual: Tensor
    """Mass on all visual tokens of the prompt."""
    prompt: Tensor
    """Mass on the prompt, visual tokens included."""
    sink: Tensor
    """Mass on the first token."""
    target_share: Tensor
    """Mass on the annotated cells divided by the mass on all visual tokens. 0 where there is none."""
    entropy: Tensor
    """Entropy in nats."""


@torch.no_grad()
def row_mass(attention_BGRS: Tensor, keys: RowKeys, visual_mask_BP: Tensor, target_mask_BP: Tensor) -> RowMass:
    """Return the masses of every row's distribution.

    Args:
        attention_BGRS: Head-averaged attention. The first P columns are the prompt.
        keys: Keys that the distributions are made of.
        visual_mask_BP: Mask of visual tokens, bool.
        target_mask_BP: Mask of the visual tokens of annotated cells, bool.
    """
    P, mass = visual_mask_BP.shape[1], key_mass(attention_BGRS, keys)
    visual, prompt, sink, target, entropy = (attention_BGRS.new_empty(attention_BGRS.shape[:3]) for _ in range(5))
    for block in blocks.row_blocks(
        attention_BGRS.shape[:3], attention_BGRS.shape[3], blocks.formula_elements(attention_BGRS)
    ):
        distribution = distribution_block(attention_BGRS, mass, keys, block)
        over_prompt, b = distribution[..., :P], block[0]
        visual[block] = (over_prompt * visual_mask_BP[b, None, None]).sum(-1)
        target[block] = (over_prompt * target_mask_BP[b, None, None]).sum(-1)
        prompt[block], sink[block] = over_prompt.sum(-1), distribution[..., 0]
        entropy[block] = -torch.xlogy(distribution, distribution).sum(-1)
    share = torch.where(visual > 0, target / torch.where(visual > 0, visual, 1.0), 0.0)
    return RowMass(visual, prompt, sink, share, entropy)


def target_share(distribution_BGRS: Tensor, visual_mask_BP: Tensor, target_mask_BP: Tensor) -> Tensor:
    """Return the mass on annotated visual tokens divided by the mass on all visual tokens, [B, G, R].

    Args:
        distribution_BGRS: Distributions whose first P columns are the prompt.
        visual_mask_BP: Mask of visual tokens, bool.
        target_mask_BP: Mask of the visual tokens of annotated cells, bool.
    """
    P = visual_mask_BP.shape[1]
    visual, target = (
        torch.einsum("bgrp,bp->bgr", distribution_BGRS[..., :P], mask.to(distribution_BGRS.dtype))
        for mask in (visual_mask_BP, target_mask_BP)
    )
    return target / visual.clamp(min=torch.finfo(visual.dtype).tiny)
