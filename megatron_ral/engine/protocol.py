"""What an engine hands to a loss, and what a loss looks like to an engine."""

from dataclasses import dataclass, field
from typing import Any, Mapping, Optional, Protocol

import torch
from torch import Tensor

from megatron_ral.functional.attention_rows import RowKeys, attention_policy, head_mean_attention, row_divergence
from megatron_ral.models.group_layout import AttentionRecord, GroupLayout
from megatron_ral.parallel.collectives import all_reduce_sum_
from megatron_ral.types import TrainBatch


@dataclass(frozen=True)
class TokenOutputs:
    """What the last stage knows of the response tokens."""

    logprobs: Tensor
    """[B, G, R] float32; carries gradient in training."""
    entropy: Tensor
    """[B, G, R] float32, nats; carries gradient in training."""
    logits: Optional[Tensor] = None
    """[B, G, R, v] this rank's columns as the model gives them, in training alone; carries gradient."""


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
            columns_BS = torch.ones(len(self.attention), self.attention.shape[-1], dtype=torch.bool,
                                    device=self.attention.device)
        return RowKeys(columns_BS, self.layout.own_columns(self.kind) if exclude_self else None)

    def policy(self, keys: Optional[RowKeys] = None) -> Tensor:
        """Attention policy [B, G, R, S] over `keys` (None: the paper's); no gradient."""
        return attention_policy(self.attention, keys or self.keys())[0]

    def own_mass(self) -> Tensor:
        """[B, G, R]: attention on the row's own token."""
        own = self.layout.own_columns(self.kind)[:, None, :, None].expand(*self.attention.shape[:3], 1)
        return self.attention.gather(-1, own)[..., 0]

    def divergence(self, target: Tensor, keys: Optional[RowKeys] = None, kind: str = "jsd") -> Tensor:
        """Divergence [B, G, R] of the policy from `target`, with gradient."""
        qk = self.record.rows(self.kind, self.layout, self.heads.scale, self.heads.num_heads)
        return row_divergence(qk, self.attention, target, keys or self.keys(), kind)


class Objective(Protocol):
    """A loss as a value. Both methods return a *sum over rows, over denominators of the whole optimizer step*, so that
    adding up micro-batches, ranks and stages gives the loss of the whole optimizer step; metrics likewise are sums."""

    recorded_layers: frozenset[int]
    """0-based layers whose attention rows are wanted."""
    row_kind: str
    """Which rows: one of `ROW_KINDS`."""
    temperature: float
    """Logits are divided by it: the policy that is trained is the one that was sampled from."""

    def token_loss(self, outputs: TokenOutputs, batch: TrainBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss on the last stage."""

    def attention_loss(self, layer: int, rows: AttentionRows,
                       batch: TrainBatch) -> tuple[Optional[Tensor], Mapping[str, Tensor]]:
        """Loss on the stage that owns `layer`; None: only metrics."""


@dataclass(frozen=True)
class ForwardOutput:
    """Result of a pass without gradient over one micro-batch, each part on the stage that owns it."""

    tokens: Optional[TokenOutputs] = None
    attention: Mapping[int, Any] = field(default_factory=dict)
    """Layer -> what `keep` kept of its rows, by default the attention policy [B, G, R, S]."""
    hidden: Optional[Tensor] = None
    """[B, G, R, H] what the LM head reads, where it was asked for."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    grad_norm: float
    """Global norm before clipping, every parameter of every stage counted once."""
    learning_rate: float
    applied: bool
    """False: a loss or the gradient was not finite and the step was skipped."""
