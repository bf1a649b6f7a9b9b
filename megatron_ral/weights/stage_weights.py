"""Weights of one rank's stage: filled from a checkpoint folder, written to a Hugging Face folder."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_ral.models.multimodal import MultimodalStage
from megatron_ral.parallel.collectives import barrier, gather_objects, gather_shards
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.runtime.progress import tick
from megatron_ral.weights.conversion import check_weights, open_weights
from megatron_ral.weights.folders import INDEX, copy_config
from megatron_ral.weights.tensor_table import StageTensor, stage_tensors


def describe_stage(stage: MultimodalStage) -> list[StageTensor]:
    """The table of a built stage, checked against its parameters.

    Also marks each parameter with `tensor_model_parallel`, which DeepSpeed and the engine read when they count a
    gradient norm (megatron-core sets it only when it initialises the weights itself).
    """
    layout = stage.layout
    visual_names = [name for name, _ in stage.visual.named_parameters()] if stage.visual is not None else []
    table = list(
        stage_tensors(
            stage.shape,
            layout.stage_layers(stage.shape.num_layers),
            layout.is_first_stage,
            layout.is_last_stage,
            layout.tensor_size,
            visual_names,
        )
    )
    parameters = dict(stage.named_parameters())
    assert {tensor.name for tensor in table} == set(parameters)
    for tensor in table:
        parameters[tensor.name].tensor_model_parallel = tensor.cut_dim is not None
    return table


@torch.no_grad()
def load_stage(stage: MultimodalStage, path: str) -> None:
    """Fill a stage from a Hugging Face or Megatron folder of any layout.

    Raises:
        CheckpointError: damaged, or with missing, unexpected or mis-shaped tensors, all of them listed.
    """
    weights, layout = open_weights(path), stage.layout
    check_weights(weights, stage.shape)
    parameters = dict(stage.named_parameters())
    for tensor in describe_stage(stage):
        tick()
        parameters[tensor.name].copy_(tensor.read(weights, layout.tensor_rank, layout.tensor_size))


@torch.no_grad()
def export_stage(stage: MultimodalStage, process_groups: ProcessGroups, source: str, output: str) -> None:
    """Write the model as a Hugging Face folder; every rank calls it, parameters resident.

    Each pipeline stage writes one safetensors file; the index, the configuration and the tokenizer are written last,
    into a temporary folder that is renamed when whole.

    Args:
        source: Hugging Face folder the run started from; everything but its weights is carried along.
        output: folder to write; an earlier one is replaced.
    """
    layout, target = process_groups.layout, Path(output)
    partial = target.with_name(target.name + ".partial")
    if layout.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    parameters, tensors = dict(stage.named_parameters()), {}
    for tensor in describe_stage(stage):
        tick()
        parameter = parameters[tensor.name]
        if getattr(parameter, "shared", False):
            continue  # the last stage's copy of tied embeddings
        shards = gather_shards(parameter.detach(), process_groups.tensor) if tensor.cut_dim is not None else [parameter]
        if layout.tensor_rank == 0 and layout.data_rank == 0:
            for name, value in zip(tensor.sources, tensor.split(tensor.join(shards, layout.tensor_size))):
                tensors[stage.shape.family.hub_name(name)] = value.detach().cpu().contiguous().clone()
    file = f"model-{layout.pipeline_rank + 1:05d}-of-{layout.pipeline_size:05d}.safetensors"
    if layout.tensor_rank == 0 and layout.data_rank == 0:
        save_file(tensors, partial / file, metadata={"format": "pt"})
    written = gather_objects(
        (file, sorted(tensors), sum(t.numel() * t.element_size() for t in tensors.values())), process_groups.pipeline
    )
    barrier()
    if layout.rank == 0:
        weight_map = {name: file for file, names, _ in written for name in names}
        index = {"metadata": {"total_size": sum(size for _, _, size in written)}, "weight_map": weight_map}
        (partial / INDEX).write_text(json.dumps(index, indent=2))
        copy_config(source, partial)
        earlier = target.with_name(target.name + ".earlier")
        shutil.rmtree(earlier, ignore_errors=True)
        if target.exists():
            target.rename(earlier)
        partial.rename(target)
        shutil.rmtree(earlier, ignore_errors=True)
    barrier()
