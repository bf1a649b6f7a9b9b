"""Results of an engine's passes and steps."""

from dataclasses import dataclass, field
from typing import Any, Mapping, Optional

from torch import Tensor

from megatron_ral.objectives.base import TokenOutputs


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
