"""What an engine hands to a loss, and what a loss looks like to an engine."""

from dataclasses import dataclass, field
from typing import Any, Mapping, Optional, Protocol

from torch import Tensor

from megatron_ral.models.group_layout import GroupLayout
from megatron_ral.types import TrainBatch


@dataclass(frozen=True)
class TokenOutputs:
    """What the last stage knows of the response tokens."""

    logprobs: Tensor
    """[B, G, R] float32; carries gradient in training."""
    entropy: Tensor
    """[B, G, R] float32, nats; carries gradient in training."""


@dataclass(frozen=True)
class AttentionRows:
    """Attention of the response rows of one layer, averaged over all heads of all tensor ranks, float32."""

    attention: Tensor
    """[B, G, R, S], the row's own token included, rows summing to 1."""
    policy: Tensor
    """[B, G, R, S], own token excluded and renormalised (paper eq. 2)."""
    layout: GroupLayout


class Objective(Protocol):
    """A loss as a value. Both methods return a *sum over rows, over denominators of the whole optimizer step*, so that
    adding up micro-batches, ranks and stages gives the loss of the whole optimizer step; metrics likewise are sums."""

    recorded_layers: frozenset[int]
    """0-based layers whose attention rows are wanted."""
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


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    grad_norm: float
    """Global norm before clipping, every parameter of every stage counted once."""
    learning_rate: float
    applied: bool
    """False: the gradient was not finite and the step was skipped."""
