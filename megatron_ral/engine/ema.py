"""The exponential average of past policies, as a frozen engine that follows the policy shard by shard."""

from typing import Iterator

import torch
from torch import Tensor

from megatron_ral.engine.frozen import FrozenEngine
from megatron_ral.engine.policy import PolicyEngine
from megatron_ral.weights.resharding import StateSource, fitting_shard


class AverageEngine(FrozenEngine):
    """Frozen engine with average = decay * average + (1 - decay) * policy after each `follow`.

    Both engines cut a parameter alike over data-parallel ranks, so that every rank averages its own shards and nothing is
    sent. The average is kept in float32 beside shards of the model's precision, where small steps would be lost.

    Args:
        policy: engine to follow; the average starts at its weights' checkpoint.
        decay: share that is kept.
    """

    def __init__(self, policy: PolicyEngine, decay: float):
        config = policy.config
        super().__init__(
            policy.shape,
            policy.process_groups,
            config.model.dtype,
            config.model.path,
            config.parallel.sequence_parallel,
            config.parallel.offload_parameters,
            config.parallel.gather,
            config.parallel.overlap_communication,
        )
        self.decay = decay
        names = {name for name, parameter in policy.stage.named_parameters() if parameter.requires_grad}
        self._followed = {name: parameter for name, parameter in self.stage.named_parameters() if name in names}
        self._average = {
            name: parameter.ds_tensor.detach().float().clone() for name, parameter in self._followed.items()
        }

    @torch.no_grad()
    def follow(self, policy: PolicyEngine) -> None:
        """Move towards the policy's master weights."""
        for name, master in policy.master_shards().items():
            self._average[name].lerp_(master.view_as(self._average[name]), 1.0 - self.decay)
            self._followed[name].ds_tensor.data.copy_(self._average[name])

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's shards of the average by `ema/<parameter>`; the next step changes them in place."""
        for name, average in self._average.items():
            yield f"ema/{name}", average

    @torch.no_grad()
    def load_state(self, state: StateSource) -> None:
        """Inverse of `state`.

        Raises:
            CheckpointError: a shard is missing or of another size.
        """
        for name, average in self._average.items():
            average.copy_(fitting_shard(state, f"ema/{name}", average.numel()).view_as(average))
            self._followed[name].ds_tensor.data.copy_(average)
