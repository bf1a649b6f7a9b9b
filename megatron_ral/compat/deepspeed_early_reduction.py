"""Reduce gradients of a layer while the backward pass of earlier layers is still running.

DeepSpeed's `coalesce_grad_reduction` delays every reduction until the last backward pass of a step has ended. A layer's
gradients are complete earlier, and can be reduced on DeepSpeed's own stream (`overlap_comm`) in the meantime.

Tried on: DeepSpeed 0.19.8.
Retired by: `test_deepspeed_still_reduces_only_at_the_end_of_a_coalesced_step`.
"""

from functools import partial
from typing import Any, Iterable

import torch


class EarlyReduction:
    """Reduction of each module's gradients as soon as the last backward pass of the step has added to all of them.

    It is used inside `coalesce_grad_reduction`. Every data-parallel rank must reduce the same gradients in the same
    order, whatever its samples contain. Gradients are therefore reduced by whole modules whose parameters every pass
    uses, in the order in which a backward pass leaves the modules, and within a module in the order of its parameters.

    Args:
        zero_optimizer: DeepSpeed's ZeRO-3 optimizer.
        modules: Transformer layers to reduce early. If there are none, everything is reduced at the end.
    """

    def __init__(self, zero_optimizer: Any, modules: Iterable[torch.nn.Module]):
        self._zero, self._is_last = zero_optimizer, False
        self._reduced: set[int] = set()
        self._arrivals: list[set[int]] = []
        for module in modules:
            parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
            arrived: set[int] = set()
            self._arrivals.append(arrived)
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, arrived, parameters))

    def begin_with_backward_of(self, output: torch.Tensor) -> None:
        """Start reducing when the gradient of `output`, the stage's output for the last micro-batch, arrives."""
        output.register_hook(self._begin)

    def finish(self) -> set[int]:
        """Reduce the rest of DeepSpeed's bucket.

        Returns:
            `id` of each parameter whose gradient was reduced since the last call.
        """
        if self._reduced:
            self._zero.independent_gradient_partition_epilogue()
        for arrived in self._arrivals:
            arrived.clear()
        reduced, self._reduced, self._is_last = self._reduced, set(), False
        return reduced

    def _begin(self, grad: torch.Tensor) -> None:
        self._is_last = True
        self._zero.set_gradient_accumulation_boundary(True)

    def _arrived(self, arrived: set[int], parameters: list[torch.nn.Parameter], parameter: torch.nn.Parameter) -> None:
        if not self._is_last:
            return
        arrived.add(id(parameter))
        if len(arrived) == len(parameters):
            for member in parameters:
                self._reduced.add(id(member))
                self._zero.reduce_independent_p_g_buckets_and_remove_grads(member)
