"""Interfaces of the code that forms attention rows from queries and keys, and of the formulas over formed rows."""

from typing import Callable, NamedTuple, Protocol

from torch import Tensor

from megatron_ral.attention.types import Block, RowKeys, RowQK

SlopeOf = Callable[[Block], Tensor]
"""Block -> dD/da of its rows times the gradient that reaches them, over `num_heads`: [b, g, r, S], contiguous."""

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


class Compared(NamedTuple):
    """Rows that are compared with their targets, all tensors without gradient."""

    attention_BGRS: Tensor
    """Head-averaged attention."""
    mass_BGR: Tensor
    """Mass Z of each row on its keys, from `RowFormulas.divergence`."""
    target_BGRS: Tensor
    """Target distributions, maybe expanded from fewer rows."""
    keys: RowKeys
    """Keys that the distributions are made of."""
    kind: str
    """Name of `divergence.DIVERGENCES`."""


class RowFormulas(Protocol):
    """One way to compute formulas over head-averaged rows [B, G, R, S]. All results are without gradient.

    Rows that are equal bit for bit have equal distributions bit for bit, in whichever block they are.
    """

    def key_mass(self, attention_BGRS: Tensor, keys: RowKeys) -> Tensor:
        """Return the mass Z of each row on its keys, [B, G, R]."""
        ...

    def distribution(self, attention_BGRS: Tensor, keys: RowKeys) -> tuple[Tensor, Tensor]:
        """Return (`distribution.attention_distribution`, Z)."""
        ...

    def divergence(
        self, attention_BGRS: Tensor, target_BGRS: Tensor, keys: RowKeys, kind: str
    ) -> tuple[Tensor, Tensor]:
        """Return (divergence of each row from its target, Z), both [B, G, R]. Rows without either give 0."""
        ...

    def slope(self, rows: Compared, grad_BGR: Tensor, block: Block) -> Tensor:
        """Return dD/da of a block times the gradient that reaches its rows, [b, g, r, S], contiguous."""
        ...

    def masses(self, attention_BGRS: Tensor, keys: RowKeys, visual_mask_BP: Tensor, target_mask_BP: Tensor) -> Tensor:
        """Return `mass.row_masses`, [6, B, G, R]."""
        ...
