"""Gated linear unit of the feed-forward layers: silu(gate) * up, of both halves of one product.

megatron-core's own keeps silu(gate) and a copy of up for the backward pass too. Here that pass reads the product alone,
[.., 2 F] in place of [.., 4 F], and writes its gradient into one tensor. Every value is rounded as before.

Source: Shazeer 2020, GLU Variants Improve Transformer (arXiv 2002.05202).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: Tensor) -> Tensor:
        ctx.save_for_backward(product)
        gate, up = product.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        [grad], [product] = grads, ctx.saved_tensors
        gate, up = product.chunk(2, dim=-1)
        result = torch.empty_like(product)
        to_gate, to_up = result.chunk(2, dim=-1)
        active = F.silu(gate)
        torch.mul(grad, active, out=to_up)
        torch.mul(grad, up, out=active)
        torch.ops.aten.silu_backward.grad_input(active, gate, grad_input=to_gate)
        return result


class SwiGlu(torch.nn.Module):
    """Activation of a feed-forward layer.

    Args:
        config: megatron-core's configuration, which every activation gets. Not read.
    """

    def __init__(self, config: Any = None):
        super().__init__()

    def forward(self, product: Tensor) -> Tensor:
        """Return silu(gate) * up, [.., F] with gradient.

        Args:
            product: Gates, then values to be gated, [.., 2 F].
        """
        return _SwiGlu.apply(product)
