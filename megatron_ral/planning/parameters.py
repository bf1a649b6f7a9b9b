"""How many parameters each rank of a layout holds, from the table of tensors alone (no module, no memory)."""

from dataclasses import dataclass

import torch

from megatron_ral.models.parameter_shapes import expected_shapes, visual_shapes
from megatron_ral.models.shape import ModelShape
from megatron_ral.weights.tensor_table import stage_tensors
from megatron_ral.parallel.rank_layout import RankLayout


@dataclass(frozen=True)
class StageParameters:
    """One pipeline stage."""

    stage: int
    layers: range
    per_tensor_rank: int
    """Parameters of the stage on one tensor rank while it is gathered."""
    per_rank: int
    """ZeRO-3 shard that one rank holds between steps (each parameter padded to the data-parallel ranks)."""
    unique: int
    """Parameters of the model that live here first: cut ones over all tensor ranks, copies and padding not counted."""


def stage_parameters(shape: ModelShape, layout: RankLayout) -> list[StageParameters]:
    """Every stage of a layout; the sum of `unique` is the model's number of parameters."""
    names, sizes, seen, result = list(visual_shapes(shape)), expected_shapes(shape), set(), []
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
    """Table of the stages and the total."""
    rows = [f"{'stage':>6} {'layers':>9} {'per tensor rank':>18} {'ZeRO-3 shard per rank':>23}"]
    stages = stage_parameters(shape, layout)
    for stage in stages:
        layers = f"{stage.layers.start}-{stage.layers.stop - 1}"
        rows.append(f"{stage.stage:>6} {layers:>9} {stage.per_tensor_rank:>18,} {stage.per_rank:>23,}")
    rows.append(f"the model: {sum(stage.unique for stage in stages):,} parameters")
    return "\n".join(rows)
