"""Attention distribution of a row: head-averaged attention over some of its keys, renormalised (RAL paper, eq. 2)."""

import torch
from torch import Tensor

from megatron_ral.attention import blocks
from megatron_ral.attention.types import ALL_ROWS, Block, RowKeys


def included_keys(keys: RowKeys, block: Block = ALL_ROWS) -> Tensor:
    """Return the mask of keys that the distributions of a block are made of, visible to the row or not.

    Returns:
        [b, 1, 1, S] bool, or [b, 1, r, S] where each row leaves its own token out.
    """
    b, _, r = block
    included = keys.columns_BS[b, None, None]
    if keys.own_BR is None:
        return included
    own = keys.own_BR[b, None, r, None]
    return included & (torch.arange(included.shape[-1], device=own.device) != own)


def key_mass(attention_BGRS: Tensor, keys: RowKeys) -> Tensor:
    """Return Z of `attention_distribution`, [B, G, R], without gradient.

    The sum is always taken in the same blocks, because its rounding can depend on the shape of what is summed: rows
    that are equal bit for bit must have equal distributions, in whichever blocks these are formed.
    """
    mass = torch.empty_like(attention_BGRS[..., 0])
    for block in blocks.row_blocks(mass.shape, attention_BGRS.shape[3], blocks.formula_elements(attention_BGRS)):
        mass[block] = (attention_BGRS[block].detach() * included_keys(keys, block)).sum(dim=-1)
    return mass


def attention_distribution(attention_BGRS: Tensor, keys: RowKeys) -> tuple[Tensor, Tensor]:
    """Renormalise head-averaged attention over the included keys.

        p[i] = a[i] / Z,   Z = sum of a over the included keys

    Heads are averaged first and the average is renormalised. The other order gives another distribution.

    Args:
        attention_BGRS: Head-averaged attention, float32.
        keys: Keys that the distribution is made of.

    Returns:
        (p of the same shape, Z [B, G, R]). A row without mass on its keys gives p = 0 and Z = 0. No gradient.

    Source: RAL paper (arXiv 2602.04884) eq. (2).
    """
    mass = key_mass(attention_BGRS, keys)
    return distribution_block(attention_BGRS, mass, keys), mass


def distribution_block(attention_BGRS: Tensor, mass_BGR: Tensor, keys: RowKeys, block: Block = ALL_ROWS) -> Tensor:
    """Return the distributions of one block of rows, [b, g, r, S]. The arguments are those of the whole batch."""
    distribution, mass = attention_BGRS[block].detach() * included_keys(keys, block), mass_BGR[block]
    return distribution.div_(torch.where(mass > 0, mass, torch.inf)[..., None])
