"""Frozen model (reference, teacher, or the model of an evaluation): a stage under ZeRO-3 without an optimizer.

With adapters the reference is the policy with its adapters off, which holds nothing of its own.
"""

from typing import Any

from megatron_ral.engine.outputs import ForwardOutput
from megatron_ral.engine.settings import EngineSettings
from megatron_ral.engine.stage import StageEngine
from megatron_ral.models.adapted_linear import adapters_off
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.process_groups import ProcessGroups


class FrozenEngine(StageEngine):
    """Frozen stage of one rank. It runs forward and generates, and never changes."""

    def __init__(self, shape: ModelShape, process_groups: ProcessGroups, settings: EngineSettings):
        super().__init__(shape, process_groups, settings)


class PolicyBase:
    """Base weights of a policy with adapters, as a frozen model.

    Args:
        policy: Engine with adapters.
    """

    def __init__(self, policy: StageEngine):
        self.policy = policy

    def forward(self, *args: Any, **kwargs: Any) -> list[ForwardOutput]:
        """Run the policy's `forward` with all adapters off."""
        with adapters_off(self.policy.stage):
            return self.policy.forward(*args, **kwargs)
