"""Attention rows of one layer, summed over tensor-parallel ranks, and what is computed from them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ral.attention.distribution import attention_distribution
from megatron_ral.attention.group_layout import AttentionRecord, GroupLayout
from megatron_ral.attention.rows import head_mean_attention, row_divergence
from megatron_ral.attention.types import QueryPosition, RowKeys
from megatron_ral.parallel.collectives import all_reduce_sum_
from megatron_ral.types import PromptBatch


@dataclass(frozen=True)
class HeadSettings:
    """Attention-head settings shared by all tensor-parallel ranks."""

    scale: float
    """Softmax scale."""
    num_heads: int
    """Number of heads of all tensor-parallel ranks."""
    process_group: Any
    """Tensor-parallel process group."""


@dataclass(frozen=True)
class AttentionRows:
    """Rows of one layer at one query position: attention averaged over the heads of all tensor-parallel ranks.

    They are formed where they are first asked for, by all ranks of a tensor-parallel group alike.
    """

    record: AttentionRecord
    """Queries and keys of this rank's heads, which carry the gradient."""
    layout: GroupLayout
    position: QueryPosition
    heads: HeadSettings

    @cached_property
    def attention(self) -> Tensor:
        """Rows [B, G, R, S] float32 over every visible key, each summing to 1, without gradient. R = G = 1 for
        `LAST_PROMPT`."""
        qk = self.record.rows(self.position, self.layout, self.heads.scale, self.heads.num_heads)
        return all_reduce_sum_(head_mean_attention(qk), self.heads.process_group)

    def at(self, position: QueryPosition) -> "AttentionRows":
        """Return rows of the same pass at another query position."""
        return self if position is self.position else AttentionRows(self.record, self.layout, position, self.heads)

    def of_record(self, record: AttentionRecord) -> "AttentionRows":
        """Return the same rows of another pass, from its record."""
        return AttentionRows(record, self.layout, self.position, self.heads)

    def keys(self, columns_BS: Optional[Tensor] = None, exclude_self: bool = True) -> RowKeys:
        """Return the keys that a distribution is made of.

        Args:
            columns_BS: Mask of the keys that count, bool. None: all.
            exclude_self: Leave the row's own token out (the paper).
        """
        columns = self._every_column if columns_BS is None else columns_BS
        return RowKeys(columns, self._own_columns if exclude_self else None)

    @cached_property
    def _every_column(self) -> Tensor:
        shape = len(self.attention), self.attention.shape[-1]
        return torch.ones(shape, dtype=torch.bool, device=self.attention.device)

    @cached_property
    def _own_columns(self) -> Tensor:
        return self.layout.own_columns(self.position)

    def named_keys(self, name: str, prompts: PromptBatch, exclude_self: bool) -> RowKeys:
        """Return the keys of a setting `attention_keys`.

        Args:
            name: `all`, `visual` (visual tokens) or `prompt` (real prompt tokens).
            prompts: Prompts of the rows.
            exclude_self: Leave the row's own token out.
        """
        if name == "all":
            return self.keys(None, exclude_self)
        inside = torch.arange(self.layout.P, device=self.attention.device) < prompts.prompt_lengths[:, None]
        chosen = prompts.visual_mask if name == "visual" else inside
        return self.keys(F.pad(chosen, (0, self.attention.shape[-1] - self.layout.P)), exclude_self)

    def distribution(self, keys: Optional[RowKeys] = None) -> Tensor:
        """Return the attention distributions [B, G, R, S] over `keys` (None: the paper's), without gradient."""
        return attention_distribution(self.attention, keys or self.keys())[0]

    def divergence(self, target: Tensor, keys: Optional[RowKeys] = None, kind: str = "jsd") -> Tensor:
        """Return the divergence [B, G, R] of each distribution from `target`, in nats, with gradient."""
        qk = self.record.rows(self.position, self.layout, self.heads.scale, self.heads.num_heads)
        return row_divergence(qk, self.attention, target, keys or self.keys(), kind)
