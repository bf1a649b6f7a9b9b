"""Formulas over rows in PyTorch, block by block, on any device and for float32 or float64."""

from typing import Iterator

import torch
from torch import Tensor

from megatron_ral.attention import blocks
from megatron_ral.attention.backend import Compared
from megatron_ral.attention.divergence import DIVERGENCES
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


class TorchFormulas:
    """Formulas that run wherever PyTorch runs."""

    def key_mass(self, attention_BGRS: Tensor, keys: RowKeys) -> Tensor:
        # The sum is always taken in the same blocks, because its rounding can depend on the shape of what is summed.
        mass = torch.empty_like(attention_BGRS[..., 0])
        for block in _blocks(attention_BGRS):
            mass[block] = (attention_BGRS[block].detach() * included_keys(keys, block)).sum(dim=-1)
        return mass

    def distribution(self, attention_BGRS: Tensor, keys: RowKeys) -> tuple[Tensor, Tensor]:
        mass = self.key_mass(attention_BGRS, keys)
        return _distribution(attention_BGRS, mass, keys), mass

    def divergence(
        self, attention_BGRS: Tensor, target_BGRS: Tensor, keys: RowKeys, kind: str
    ) -> tuple[Tensor, Tensor]:
        mass = self.key_mass(attention_BGRS, keys)
        result = torch.empty_like(mass)
        for block in _blocks(attention_BGRS):
            target = target_BGRS[block]
            value = DIVERGENCES[kind].value(_distribution(attention_BGRS, mass, keys, block), target)
            result[block] = torch.where(_is_compared(mass[block], target), value, 0.0)
        return result, mass

    def slope(self, rows: Compared, grad_BGR: Tensor, block: Block) -> Tensor:
        if not grad_BGR.is_cuda:
            return _slope(rows, grad_BGR, block)
        shape, starts = grad_BGR[block].shape, [part.start for part in block]
        result = rows.attention_BGRS.new_empty(*shape, rows.attention_BGRS.shape[3])
        for inner in blocks.row_blocks(shape, result.shape[3], blocks.formula_elements(result)):
            b, g, r = (slice(part.start + start, part.stop + start) for part, start in zip(inner, starts))
            result[inner] = _slope(rows, grad_BGR, (b, g, r))
        return result

    def masses(self, attention_BGRS: Tensor, keys: RowKeys, visual_mask_BP: Tensor, target_mask_BP: Tensor) -> Tensor:
        P, mass = visual_mask_BP.shape[1], self.key_mass(attention_BGRS, keys)
        result = attention_BGRS.new_zeros(6, *attention_BGRS.shape[:3])
        visual, prompt, sink, own, entropy, share = result
        for block in _blocks(attention_BGRS):
            distribution = _distribution(attention_BGRS, mass, keys, block)
            over_prompt, b = distribution[..., :P], block[0]
            visual[block] = (over_prompt * visual_mask_BP[b, None, None]).sum(-1)
            target = (over_prompt * target_mask_BP[b, None, None]).sum(-1)
            share[block] = target / visual[block].clamp(min=torch.finfo(target.dtype).tiny)
            prompt[block], sink[block] = over_prompt.sum(-1), distribution[..., 0]
            entropy[block] = -torch.xlogy(distribution, distribution).sum(-1)
        if keys.own_BR is not None:
            columns = keys.own_BR[:, None, :, None].expand(*attention_BGRS.shape[:3], 1)
            own.copy_(attention_BGRS.gather(-1, columns)[..., 0])
        return result


def _blocks(attention: Tensor) -> Iterator[Block]:
    """Return the blocks in which formulas over a whole map are computed."""
    return blocks.row_blocks(attention.shape[:3], attention.shape[3], blocks.formula_elements(attention))


def _distribution(attention_BGRS: Tensor, mass_BGR: Tensor, keys: RowKeys, block: Block = ALL_ROWS) -> Tensor:
    """Return the distributions of one block of rows, [b, g, r, S]. The arguments are those of the whole batch."""
    distribution, mass = attention_BGRS[block].detach() * included_keys(keys, block), mass_BGR[block]
    return distribution.div_(torch.where(mass > 0, mass, torch.inf)[..., None])


def _slope(rows: Compared, grad_BGR: Tensor, block: Block) -> Tensor:
    mass, target = rows.mass_BGR[block], rows.target_BGRS[block]
    distribution = _distribution(rows.attention_BGRS, rows.mass_BGR, rows.keys, block)
    slope = DIVERGENCES[rows.kind].slope(distribution, target)
    slope = slope - (distribution * slope).sum(dim=-1, keepdim=True)
    # Rows and keys of next to no mass (1e-30) would overflow. The bounds only make their gradient smaller.
    least, bound = torch.finfo(slope.dtype).tiny * 2**26, torch.finfo(slope.dtype).max / 2**10
    slope /= torch.where(_is_compared(mass, target), mass.clamp(min=least), torch.inf)[..., None]
    return slope.clamp_(-bound, bound).mul_(included_keys(rows.keys, block)).mul_(grad_BGR[block][..., None])


def _is_compared(mass: Tensor, target: Tensor) -> Tensor:
    """Return the bool mask of rows that have both a distribution and a target."""
    return (mass > 0) & (target.sum(dim=-1) > 0)
