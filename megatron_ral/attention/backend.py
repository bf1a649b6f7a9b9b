"""Interface of the code that forms attention rows and their gradients from queries and keys."""

from typing import Callable, Protocol

from torch import Tensor

from megatron_ral.attention.types import Block, RowQK

SlopeOf = Callable[[Block], Tensor]
"""Block -> dD/da of its rows times the gradient that reaches them, over `num_heads`: [b, g, r, S]."""

Gradients = tuple[Tensor, Tensor, Tensor]
"""Gradients of query, prompt keys and response keys: float32 or wider, contiguous, zeros at first."""


class RowBackend(Protocol):
    """One way to form rows. Backends differ by rounding alone."""

    def head_mean_rows(self, qk: RowQK) -> Tensor:
        """Return `rows.head_mean_attention`, [B, G, R, S], without gradient."""
        ...

    def add_gradients(self, qk: RowQK, slope_of: SlopeOf, gradients: Gradients) -> None:
        """Add the gradients of all rows to `gradients`."""
        ...
