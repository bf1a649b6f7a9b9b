"""Masses of attention distributions on parts of the input, and their entropy."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ral.attention.formulas import choose_formulas
from megatron_ral.attention.types import RowKeys


class RowMass(NamedTuple):
    """Masses of each row's distribution, all [B, G, R], or their sums over rows. Without gradient."""

    visual: Tensor
    """Mass on all visual tokens of the prompt."""
    prompt: Tensor
    """Mass on the prompt, visual tokens included."""
    sink: Tensor
    """Mass on the first token."""
    own: Tensor
    """Attention on the row's own token, before renormalising. 0 where the keys name none."""
    entropy: Tensor
    """Entropy in nats."""
    target_share: Tensor
    """Mass on the annotated cells divided by the mass on all visual tokens. 0 where there is none."""


@torch.no_grad()
def row_masses(attention_BGRS: Tensor, keys: RowKeys, visual_mask_BP: Tensor, target_mask_BP: Tensor) -> Tensor:
    """Return the masses of every row's distribution in the order of `RowMass`, [6, B, G, R].

    Args:
        attention_BGRS: Head-averaged attention. The first P columns are the prompt.
        keys: Keys that the distributions are made of.
        visual_mask_BP: Mask of visual tokens, bool.
        target_mask_BP: Mask of the visual tokens of annotated cells, bool.
    """
    return choose_formulas(attention_BGRS).masses(attention_BGRS, keys, visual_mask_BP, target_mask_BP)


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
