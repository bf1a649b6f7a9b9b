"""Attention rows of one layer, summed over tensor-parallel ranks, and what is computed from them."""

from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from megatron_ral.attention.group_layout import AttentionRecord, GroupLayout
from megatron_ral.attention.rows import RowKeys, attention_distribution, head_mean_attention, row_divergence
from megatron_ral.parallel.collectives import all_reduce_sum_


@dataclass(frozen=True)
class Heads:
    """What this rank's heads are a part of."""

    scale: float
    """Softmax scale."""
    num_heads: int
    """Heads of all tensor ranks."""
    group: Any
    """Tensor-parallel group."""


@dataclass(frozen=True)
class AttentionRows:
    """Rows of one layer: their attention averaged over the heads of all tensor ranks, and where it comes from."""

    attention: Tensor
    """[B, G, R, S] float32, every visible key included, rows summing to 1; no gradient. R = 1 = G for `last_prompt`."""
    record: AttentionRecord
    """Queries and keys of this rank's heads, which carry the gradient."""
    layout: GroupLayout
    kind: str
    """One of `ROW_KINDS`."""
    heads: Heads

    @classmethod
    def form(cls, record: AttentionRecord, layout: GroupLayout, kind: str, heads: Heads) -> "AttentionRows":
        """Part of this rank's heads -> sum over tensor ranks, whose ranks must all call it."""
        attention = head_mean_attention(record.rows(kind, layout, heads.scale, heads.num_heads))
        return cls(all_reduce_sum_(attention, heads.group), record, layout, kind, heads)

    def of_kind(self, kind: str) -> "AttentionRows":
        """Other rows of the same pass."""
        return self if kind == self.kind else self.form(self.record, self.layout, kind, self.heads)

    def of_record(self, record: AttentionRecord) -> "AttentionRows":
        """The same rows of another pass."""
        return self.form(record, self.layout, self.kind, self.heads)

    def keys(self, columns_BS: Optional[Tensor] = None, exclude_self: bool = True) -> RowKeys:
        """Keys a policy is made of: the given columns (bool; None: all), by default without the row's own token as in
        the paper."""
        if columns_BS is None:
            columns_BS = torch.ones(
                len(self.attention), self.attention.shape[-1], dtype=torch.bool, device=self.attention.device
            )
        return RowKeys(columns_BS, self.layout.own_columns(self.kind) if exclude_self else None)

    def policy(self, keys: Optional[RowKeys] = None) -> Tensor:
        """Attention policy [B, G, R, S] over `keys` (None: the paper's); no gradient."""
        return attention_distribution(self.attention, keys or self.keys())[0]

    def own_mass(self) -> Tensor:
        """[B, G, R]: attention on the row's own token."""
        own = self.layout.own_columns(self.kind)[:, None, :, None].expand(*self.attention.shape[:3], 1)
        return self.attention.gather(-1, own)[..., 0]

    def divergence(self, target: Tensor, keys: Optional[RowKeys] = None, kind: str = "jsd") -> Tensor:
        """Divergence [B, G, R] of the policy from `target`, with gradient."""
        qk = self.record.rows(self.kind, self.layout, self.heads.scale, self.heads.num_heads)
        return row_divergence(qk, self.attention, target, keys or self.keys(), kind)
