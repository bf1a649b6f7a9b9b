"""What an engine hands to a loss, and what a loss looks like to an engine."""

from dataclasses import dataclass
from typing import Mapping, Optional, Protocol

from torch import Tensor

from megatron_ral.attention.layer_rows import AttentionRows
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

    def attention_loss(
        self, layer: int, rows: AttentionRows, batch: TrainBatch
    ) -> tuple[Optional[Tensor], Mapping[str, Tensor]]:
        """Loss on the stage that owns `layer`; None: only metrics."""
