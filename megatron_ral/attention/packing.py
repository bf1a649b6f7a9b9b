"""Sequences of different lengths, either padded to a rectangle or one after the other without padding.

Linear layers, norms and the LM head read tokens one after the other, so that nothing is computed for padding. Attention
needs a rectangle. `Packing` changes one form into the other. Nothing of it is read from a device. (Published as removal
of padding, e.g. ByteTransformer, arXiv 2210.03052.)
"""

import math
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor


class _Put(torch.autograd.Function):
    """Rows at distinct places of a larger tensor that is zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return rows.new_zeros(size, *rows.shape[1:]).index_copy_(0, places, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Take.apply(grads[0], *ctx.saved_tensors), None, None


class _Take(torch.autograd.Function):
    """Rows at distinct places. The gradient is put there without a sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = rows.shape[0]
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Put.apply(grads[0], *ctx.saved_tensors, ctx.size), None


def take(rows: Tensor, places: Tensor) -> Tensor:
    """Return rows[places], [N, ...], for distinct places [N] int64 of rows [X, ...]; carries gradient."""
    return _Take.apply(rows, places)


@dataclass(frozen=True)
class Packing:
    """Lengths of some sequences, and where their tokens stand in a padded tensor."""

    num_tokens: int
    """Sum of the lengths."""
    shape: tuple[int, ...]
    """Leading sizes of the padded tensor: those of the lengths, then the padded length."""
    places: Optional[Tensor] = None
    """Place of each token in the flattened `shape`, [num_tokens] int64, distinct and ascending. None: no padding."""

    @classmethod
    def of(cls, lengths: Tensor, width: int) -> "Packing":
        """Return the packing of sequences on the right of which padding stands.

        Args:
            lengths: [...] int64 in host memory.
            width: Padded length, at least the largest of them.
        """
        num_tokens, shape = int(lengths.sum()), (*lengths.shape, width)
        if num_tokens == lengths.numel() * width:
            return cls(num_tokens, shape)
        is_real = torch.arange(width, device=lengths.device) < lengths[..., None]
        return cls(num_tokens, shape, is_real.flatten().nonzero()[:, 0])

    def pad(self, packed: Tensor) -> Tensor:
        """Return packed tokens [num_tokens, ...] as [*shape, ...], zero at padding; carries gradient."""
        padded = packed if self.places is None else _Put.apply(packed, self.places, math.prod(self.shape))
        return padded.unflatten(0, self.shape)

    def pack(self, padded: Tensor) -> Tensor:
        """Return padded tokens [*shape, ...] as [num_tokens, ...]; carries gradient."""
        flat = padded.flatten(0, len(self.shape) - 1)
        return flat if self.places is None else take(flat, self.places)
