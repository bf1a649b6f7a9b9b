"""Weights of a running model as a stream of Hugging Face tensors, one after the other.

A parameter is a ZeRO-3 shard on each data-parallel rank of a part on each tensor-parallel rank of a pipeline stage. The
stream makes one parameter whole, yields the tensors that it consists of, and lets it go before the next. Beside its
shards a rank never holds more than two whole parameters (the one that is joined, and the one whose last tensor the
reader still refers to) and two tensor-parallel parts. Queries, keys and values count twice, because they are copied out
of one parameter.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Callable, Iterator, NamedTuple, Optional

import torch
from torch import Tensor

from megatron_ral.models.adapters import adapted_matrix, is_adapter, with_adapter
from megatron_ral.models.multimodal import MultimodalStage
from megatron_ral.models.parameter_shapes import expected_shapes
from megatron_ral.parallel.collectives import broadcast_from_stage_, shards_in_turn
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.runtime.progress import tick
from megatron_ral.weights.tensor_table import StageTensor, stage_tables

Gathered = Callable[[Tensor], AbstractContextManager[None]]
"""Context inside which a parameter is whole on every data-parallel rank."""


def is_whole(parameter: Tensor) -> AbstractContextManager[None]:
    """Return a context that gathers nothing, for parameters that are whole (`StageEngine.resident`)."""
    return nullcontext()


class StreamedTensor(NamedTuple):
    """One tensor of a stream."""

    name: str
    """Name on the hub."""
    value: Optional[Tensor]
    """Tensor on the device, to be read only and before the next one is asked for, because it may be the memory of the
    parameter. None on a rank that does not receive."""


@torch.no_grad()
def stream_weights(
    stage: MultimodalStage,
    process_groups: ProcessGroups,
    gathered: Gathered,
    *,
    receives: bool,
    all_stages: bool = False,
    includes: Callable[[str], bool] = lambda name: True,
    merges_adapters: bool = True,
) -> Iterator[StreamedTensor]:
    """Yield the weights in the order of the modules, tied embeddings once, adapters merged.

    All ranks go through the stream to its end, because each tensor takes collectives: a gather over the data-parallel
    group, broadcasts over the tensor-parallel group, and with `all_stages` one from the stage that owns it.

    Args:
        stage: This rank's stage.
        process_groups: Process groups of the stage.
        gathered: Context of one parameter in which it is whole.
        receives: True if this rank gets the values. With `all_stages` the ranks of one pipeline group say the same.
        all_stages: Yield the tensors of all stages in their order on every rank, in place of this stage's own.
        includes: Function that chooses parameters by their names inside `MultimodalStage`, alike on every rank. An
            adapter is chosen with its matrix.
        merges_adapters: Yield matrices with their adapters merged. False: yield the base.
    """
    layout, shapes = process_groups.layout, expected_shapes(stage.shape)
    parameters, done = dict(stage.named_parameters()), set[str]()
    factors: dict[str, Tensor] = {}
    for number, table in enumerate(stage_tables(stage.shape, layout.tensor_size, layout.pipeline_size)):
        is_own = number == layout.pipeline_rank
        for tensor in table:
            is_tied_copy = done.issuperset(tensor.sources)
            done.update(tensor.sources)
            if is_tied_copy or not (is_own or all_stages) or not includes(adapted_matrix(tensor.name)):
                continue
            tick()
            if is_adapter(tensor.name):
                if is_own and merges_adapters:
                    read = own_tensors(tensor, parameters[tensor.name], process_groups, gathered, receives)
                    factors.update(
                        (name, value.clone()) for value, name in zip(read, tensor.sources) if value is not None
                    )
                continue
            if is_own:
                values = own_tensors(tensor, parameters[tensor.name], process_groups, gathered, receives)
            else:
                values = (
                    torch.empty(shapes[source], dtype=stage.dtype, device=process_groups.device) if receives else None
                    for source in tensor.sources
                )
            for value, source in zip(values, tensor.sources):  # in this order, so that `values` runs to its end
                if value is not None and is_own:
                    value = with_adapter(value, source, factors, stage.shape.adapter)
                if all_stages and value is not None:
                    broadcast_from_stage_(value, number, process_groups)
                yield StreamedTensor(stage.shape.family.hub_name(source), value)
            factors.clear()


def own_tensors(
    tensor: StageTensor, parameter: Tensor, process_groups: ProcessGroups, gathered: Gathered, receives: bool
) -> Iterator[Optional[Tensor]]:
    """Yield the Hugging Face tensors of one parameter of this stage, None for each where this rank receives nothing."""
    with gathered(parameter):
        part = parameter.detach()
        shards = shards_in_turn(part, process_groups.tensor) if tensor.cut_dim is not None else iter([part])
        if receives:
            pieces = tensor.split(tensor.join(shards, process_groups.layout.tensor_size))
            while pieces:  # popped, so that a piece that is a copy is let go when its reader is done with it
                yield pieces.pop(0).contiguous()
        else:
            for _ in shards:
                pass
            yield from [None] * len(tensor.sources)
