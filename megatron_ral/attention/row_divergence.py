"""Divergence of each row's distribution from a target, with the gradient to queries and keys in closed form."""

import functools

import torch
from torch import Tensor

from megatron_ral.attention.backend import Compared, RowBackend
from megatron_ral.attention.formulas import choose_formulas
from megatron_ral.attention.types import RowKeys, RowQK


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
        result, mass = choose_formulas(attention).divergence(attention, target, keys, kind)
        ctx.save_for_backward(query, prompt_key, response_key, attention, target, mass)
        ctx.keys, ctx.kind, ctx.rest, ctx.backend = keys, kind, tuple(qk)[3:], backend
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        query, prompt_key, response_key, attention, target, mass = ctx.saved_tensors
        qk = RowQK(query, prompt_key, response_key, *ctx.rest)
        dtype = torch.promote_types(query.dtype, torch.float32)
        sizes = [tensor.numel() for tensor in qk[:3]]
        zeros = torch.zeros(sum(sizes), dtype=dtype, device=query.device)
        gradients = tuple(part.view(tensor.shape) for part, tensor in zip(zeros.split(sizes), qk[:3]))
        rows = Compared(attention, mass, target, ctx.keys, ctx.kind)
        slope_of = functools.partial(choose_formulas(attention).slope, rows, grad / qk.num_heads)
        ctx.backend.add_gradients(qk, slope_of, gradients)
        return *(part.to(tensor.dtype) for part, tensor in zip(gradients, qk[:3])), None, None, None, None, None, None
