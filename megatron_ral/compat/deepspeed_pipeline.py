"""DeepSpeed 0.19.8 ZeRO-3 under megatron-core's pipeline schedule: what it takes.

DeepSpeed allows ZeRO-3 only without pipeline stages of its own. One plain ZeRO-3 engine per stage, driven by megatron's
schedule, works with four adaptations kept here:

1. `MegatronTopology`: the `mpu` names DeepSpeed calls, which megatron-core no longer has.
2. `use_gradient_norm`: DeepSpeed's own gradient norm counts the last stage's copy of tied embeddings a second time, and
   with an offloaded optimizer it is taken before the engine adds up what tensor ranks and tied copies share.
3. `remove_module_hooks`: DeepSpeed's per-module fetch and release hooks compare module order over all ranks (stages
   differ, so they would hang) and gather parameters anew for every micro-batch. The engine gathers in their place.
4. `EarlyReduction`: `coalesce_grad_reduction` reduces everything after the last backward pass; layers can go while it is
   still on its way, on DeepSpeed's own stream (`overlap_comm`).

`tests/distributed/test_layouts.py` covers each of them; `tests/unit/test_compat.py` tells when one is no longer needed.
"""

from contextlib import contextmanager
from functools import partial
from typing import Callable, Iterable, Iterator

import torch

from megatron_ral.parallel.process_groups import ProcessGroups


class MegatronTopology:
    """Adapter from our groups to the `mpu` interface of `deepspeed.initialize`.

    The model-parallel *group* is tensor x pipeline while the model-parallel *rank* is the tensor rank: DeepSpeed counts
    a replicated parameter (a norm weight) only where that rank is 0, which must hold once per stage.
    """

    def __init__(self, process_groups: ProcessGroups):
        self._groups = process_groups

    def get_data_parallel_world_size(self):
        return self._groups.layout.data_size

    def get_data_parallel_rank(self):
        return self._groups.layout.data_rank

    def get_data_parallel_group(self):
        return self._groups.data

    def get_model_parallel_world_size(self):
        return self._groups.layout.tensor_size * self._groups.layout.pipeline_size

    def get_model_parallel_rank(self):
        return self._groups.layout.tensor_rank

    def get_model_parallel_group(self):
        return self._groups.model

    def get_tensor_model_parallel_world_size(self):
        return self._groups.layout.tensor_size

    def get_tensor_model_parallel_rank(self):
        return self._groups.layout.tensor_rank

    def get_tensor_model_parallel_group(self):
        return self._groups.tensor

    def get_pipeline_model_parallel_world_size(self):
        return self._groups.layout.pipeline_size

    def get_pipeline_model_parallel_rank(self):
        return self._groups.layout.pipeline_rank

    def get_pipeline_model_parallel_group(self):
        return self._groups.pipeline


def use_gradient_norm(zero_optimizer, norm: Callable[[], torch.Tensor]) -> None:
    """Let ZeRO-3 clip by `norm()`, a 0-dim tensor, the same on every rank, and skip the step where it is not finite."""
    zero_optimizer._get_norm_groups = lambda: [norm()]


@contextmanager
def coalesced_reduction(engine) -> Iterator[None]:
    """`engine.coalesce_grad_reduction()` that reduces nothing after an error: other ranks may be gone, and what went wrong
    first must be what is seen. The engine is not to be used after one."""
    with engine.coalesce_grad_reduction():
        try:
            yield
        except BaseException:
            engine._flush_coalesced_reduction_zero3 = lambda optimizer: None
            raise


class EarlyReduction:
    """Inside `coalesce_grad_reduction`: the gradients of a module are reduced as soon as the last backward pass of the step
    has added to all of them.

    Which gradients those are and in which order they go must be the same on every data-parallel rank, whatever its samples
    hold: so whole modules only, each parameter of which every pass uses, in the order in which a backward pass leaves
    them, the parameters of each in their own order.

    Args:
        zero_optimizer: DeepSpeed's ZeRO-3 optimizer.
        modules: transformer layers; none: everything is reduced at the end.
    """

    def __init__(self, zero_optimizer, modules: Iterable[torch.nn.Module]):
        self._zero, self._is_last, self._reduced = zero_optimizer, False, set()
        self._arrivals: list[set[int]] = []
        for module in modules:
            parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
            arrived: set[int] = set()
            self._arrivals.append(arrived)
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, arrived, parameters))

    def begin_with_backward_of(self, output: torch.Tensor) -> None:
        """`output` is the stage's of the last micro-batch."""
        output.register_hook(self._begin)

    def finish(self) -> set[int]:
        """Reduce what is left over in DeepSpeed's bucket. Returns the ids of all parameters reduced since the last call."""
        if self._reduced:
            self._zero.independent_gradient_partition_epilogue()
        for arrived in self._arrivals:
            arrived.clear()
        reduced, self._reduced, self._is_last = self._reduced, set(), False
        return reduced

    def _begin(self, grad: torch.Tensor) -> None:
        self._is_last = True
        self._zero.set_gradient_accumulation_boundary(True)

    def _arrived(self, arrived: set[int], parameters: list, parameter: torch.nn.Parameter) -> None:
        if not self._is_last:
            return
        arrived.add(id(parameter))
        if len(arrived) == len(parameters):
            for member in parameters:
                self._reduced.add(id(member))
                self._zero.reduce_independent_p_g_buckets_and_remove_grads(member)


def remove_module_hooks(module: torch.nn.Module) -> None:
    """Take the forward hooks off a module and all in it; for right after `deepspeed.initialize`."""
    for child in module.modules():
        for hooks in (
            child._forward_pre_hooks,
            child._forward_hooks,
            child._forward_pre_hooks_with_kwargs,
            child._forward_hooks_with_kwargs,
            child._forward_hooks_always_called,
        ):
            hooks.clear()
