"""Numbers of parameters that each rank of a layout holds, from the table of tensors alone (no module, no memory)."""

from dataclasses import dataclass

import torch

from megatron_ral.models.parameter_shapes import stored_shapes, visual_shapes
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.weights.tensor_table import stage_tensors


@dataclass(frozen=True)
class StageParameters:
    """Numbers of parameters of one pipeline stage."""

    stage: int
    """Number of the stage."""
    layers: range
    """Layers of the stage, 0-based."""
    per_tensor_rank: int
    """Parameters of the gathered stage on one tensor rank."""
    per_rank: int
    """Parameters of the ZeRO-3 shard of one rank, each parameter padded to the data-parallel ranks."""
    unique: int
    """Parameters of the model that no earlier stage holds, over all tensor ranks, without copies and padding."""


def stage_parameters(shape: ModelShape, layout: RankLayout) -> list[StageParameters]:
    """Return all stages of a layout. The sum of `unique` is the model's number of parameters."""
    names, sizes, seen, result = list(visual_shapes(shape)), stored_shapes(shape), set(), []
    for stage in range(layout.pipeline_size):
        place = RankLayout(stage, layout.pipeline_size, 1, layout.pipeline_size)
        layers = place.stage_layers(shape.num_layers)
        held = shard = unique = 0
        for tensor in stage_tensors(
            shape, layers, place.is_first_stage, place.is_last_stage, layout.tensor_size, names
        ):
            full = tensor.merge([torch.empty(sizes[source], device="meta") for source in tensor.sources])
            numel = tensor.cut(full, 0, layout.tensor_size).numel()
            held += numel
            shard += -(-numel // layout.data_size)
            unique += sum(torch.Size(sizes[source]).numel() for source in tensor.sources if source not in seen)
            seen.update(tensor.sources)
        result.append(StageParameters(stage, layers, held, shard, unique))
    return result


def describe_parameters(shape: ModelShape, layout: RankLayout) -> str:
    """Return a table of the stages and the total as text."""
    rows = [f"{'stage':>6} {'layers':>9} {'per tensor rank':>18} {'ZeRO-3 shard per rank':>23}"]
    stages = stage_parameters(shape, layout)
    for stage in stages:
        layers = f"{stage.layers.start}-{stage.layers.stop - 1}"
        rows.append(f"{stage.stage:>6} {layers:>9} {stage.per_tensor_rank:>18,} {stage.per_rank:>23,}")
    rows.append(f"the model: {sum(stage.unique for stage in stages):,} parameters")
    return "\n".join(rows)
