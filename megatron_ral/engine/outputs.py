"""Results of an engine's passes and steps."""

from dataclasses import dataclass, field
from typing import Any, Mapping, Optional

from torch import Tensor

from megatron_ral.objectives.base import TokenOutputs


@dataclass(frozen=True)
class ForwardOutput:
    """Result of a pass without gradient over one micro-batch, each part on the stage that owns it."""

    tokens: Optional[TokenOutputs] = None
    attention: Mapping[int, Any] = field(default_factory=dict[int, Any])
    """Layer -> value that `store` returned of its rows, by default their distributions [B, G, R, S]."""
    hidden: Optional[Tensor] = None
    """Inputs of the LM head, [B, G, R, H], where they were asked for."""


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step."""

    grad_norm: float
    """Global gradient norm before clipping, every parameter of every stage counted once."""
    learning_rate: float
    applied: bool
    """True if the step was applied. It is skipped where a loss or the gradient is not finite."""
