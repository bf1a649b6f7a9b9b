"""Divergence of each row's distribution from a target, with the gradient to queries and keys in closed form."""

import functools

import torch
from torch import Tensor

from megatron_ral.attention import blocks
from megatron_ral.attention.backend import RowBackend
from megatron_ral.attention.distribution import distribution_block, included_keys, key_mass
from megatron_ral.attention.divergence import DIVERGENCES
from megatron_ral.attention.types import Block, RowKeys, RowQK


class RowDivergence(torch.autograd.Function):
    """Divergence of every row's distribution from its target.

    With a_h the weights of head h, a their mean, p = a / Z over the included keys, and s = dD/dp:

        D_i       = (s_i - sum_j p_j s_j) / Z     for included keys, else 0          (= dD/da_i)
        dD/de_h,i = a_h,i / num_heads * (D_i - sum_j a_h,j D_j)                      (scores e of head h)
        dD/dq_h   = scale * sum_i dD/de_h,i k_i,    dD/dk_i = scale * sum_h,rows dD/de_h,i q_h

    Source: derived in this project, checked against autograd.
    """

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        prompt_key: Tensor,
        response_key: Tensor,
        attention: Tensor,
        target: Tensor,
        keys: RowKeys,
        kind: str,
        qk: RowQK,
        backend: RowBackend,
    ) -> Tensor:
        mass = key_mass(attention, keys)
        ctx.save_for_backward(query, prompt_key, response_key, attention, target, mass)
        ctx.keys, ctx.kind, ctx.rest, ctx.backend = keys, kind, tuple(qk)[3:], backend
        result = torch.empty(attention.shape[:3], dtype=attention.dtype, device=attention.device)
        for block in blocks.row_blocks(attention.shape[:3], attention.shape[3], blocks.formula_elements(attention)):
            value = DIVERGENCES[kind].value(distribution_block(attention, mass, keys, block), target[block])
            result[block] = torch.where(_is_compared(mass[block], target[block]), value, 0.0)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        query, prompt_key, response_key, attention, target, mass = ctx.saved_tensors
        qk = RowQK(query, prompt_key, response_key, *ctx.rest)
        dtype = torch.promote_types(query.dtype, torch.float32)
        gradients = tuple(torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) for tensor in qk[:3])
        slope_of = functools.partial(_slope_block, attention, mass, target, ctx.keys, ctx.kind, grad / qk.num_heads)
        ctx.backend.add_gradients(qk, slope_of, gradients)
        return *(part.to(tensor.dtype) for part, tensor in zip(gradients, qk[:3])), None, None, None, None, None, None


def _is_compared(mass: Tensor, target: Tensor) -> Tensor:
    """Return the bool mask of rows that have both a distribution and a target."""
    return (mass > 0) & (target.sum(dim=-1) > 0)


def _slope_block(
    attention: Tensor, mass: Tensor, target: Tensor, keys: RowKeys, kind: str, grad: Tensor, block: Block
) -> Tensor:
    """Return dD/da of a block times the gradient [B, G, R] that reaches its rows, [b, g, r, S]."""
    distribution, mass, target = distribution_block(attention, mass, keys, block), mass[block], target[block]
    slope = DIVERGENCES[kind].slope(distribution, target)
    slope = slope - (distribution * slope).sum(dim=-1, keepdim=True)
    # Rows and keys of next to no mass (1e-30) would overflow. The bounds only make their gradient smaller.
    least, bound = torch.finfo(slope.dtype).tiny * 2**26, torch.finfo(slope.dtype).max / 2**10
    slope /= torch.where(_is_compared(mass, target), mass.clamp(min=least), torch.inf)[..., None]
    return slope.clamp_(-bound, bound).mul_(included_keys(keys, block)).mul_(grad[block][..., None])
