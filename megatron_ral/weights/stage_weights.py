"""Weights of one rank's stage: filled from a model folder, and written to a Hugging Face folder."""

import shutil
from pathlib import Path
from typing import Any, Optional

import torch

from megatron_ral.errors import CheckpointError
from megatron_ral.models.adapters import is_adapter
from megatron_ral.models.multimodal import MultimodalStage
from megatron_ral.models.parameter_shapes import expected_shapes
from megatron_ral.parallel.collectives import barrier
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.runtime.progress import tick
from megatron_ral.weights.conversion import check_weights, open_weights
from megatron_ral.weights.huggingface import HuggingFacePlan
from megatron_ral.weights.safetensors_files import TensorEntry
from megatron_ral.weights.stream import Gathered, is_whole, stream_weights
from megatron_ral.weights.tensor_table import StageTensor, stage_tables


def describe_stage(stage: MultimodalStage) -> list[StageTensor]:
    """Return the table of a built stage, checked against its parameters.

    Each parameter is also marked with `tensor_model_parallel`, which DeepSpeed and the engine read to form a gradient
    norm. megatron-core sets that mark only when it initialises the weights itself.
    """
    table = _tables(stage)[stage.layout.pipeline_rank]
    parameters: dict[str, Any] = dict(stage.named_parameters())
    assert {tensor.name for tensor in table} == set(parameters)
    for tensor in table:
        parameters[tensor.name].tensor_model_parallel = tensor.cut_dim is not None
    return table


@torch.no_grad()
def load_stage(stage: MultimodalStage, path: str, require_finite: bool = True) -> None:
    """Fill a stage from a Hugging Face folder, or a Megatron folder of any layout.

    Args:
        stage: This rank's stage.
        path: Folder of the weights.
        require_finite: Refuse values that are not finite in the type of the stage.

    Raises:
        CheckpointError: the folder is damaged, has missing, unexpected or mis-shaped tensors (all are listed), or a
            value that `require_finite` refuses.
    """
    weights, layout = open_weights(path), stage.layout
    check_weights(weights, stage.shape)
    parameters = dict(stage.named_parameters())
    for tensor in describe_stage(stage):
        tick()
        if is_adapter(tensor.name):
            continue  # not of this folder (see `adapter_weights`)
        parameter, value = parameters[tensor.name], tensor.read(weights, layout.tensor_rank, layout.tensor_size)
        parameter.copy_(value)
        if require_finite and not parameter.isfinite().all():
            names = ", ".join(f"'{name}'" for name in tensor.sources)
            fault = f"values beyond {stage.dtype}" if value.isfinite().all() else "NaN or infinite values"
            raise CheckpointError(f"'{path}'", None, f"has {fault} in {names}; give an earlier checkpoint")


@torch.no_grad()
def export_stage(
    stage: MultimodalStage,
    process_groups: ProcessGroups,
    source: str,
    output: str,
    format_tags: Optional[str] = None,
    gathered: Gathered = is_whole,
    merges_adapters: bool = True,
) -> None:
    """Write the model as a Hugging Face folder. Every rank calls this.

    Each pipeline stage writes one safetensors file from a stream of its weights (`weights/stream.py`). The index, the
    configuration and the tokenizer are written last. Everything is written to a temporary folder, which is renamed when
    it is complete.

    Args:
        stage: This rank's stage.
        process_groups: Process groups.
        source: Model folder to copy everything but the weights from.
        output: Folder to write. An existing one is replaced.
        format_tags: model.format_tags of the run, by which the tokenizer is edited; None: it is copied as it is.
        gathered: Context of one parameter in which it is whole; by default all are whole already.
        merges_adapters: Write matrices with their adapters merged. False: write the base.
    """
    layout, target = process_groups.layout, Path(output)
    partial = target.with_name(target.name + ".partial")
    if layout.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    plan = _export_plan(stage)
    writes = layout.tensor_rank == 0 and layout.data_rank == 0
    writer = plan.open_file(partial, layout.pipeline_rank) if writes else None
    for name, value in stream_weights(
        stage, process_groups, gathered, receives=writes, merges_adapters=merges_adapters
    ):
        if writer is not None and value is not None:
            writer.add(name, value)
    if writer is not None:
        writer.close()
    barrier()
    if layout.rank == 0:
        plan.finish(partial, source, format_tags)
        earlier = target.with_name(target.name + ".earlier")
        shutil.rmtree(earlier, ignore_errors=True)
        if target.exists():
            target.rename(earlier)
        partial.rename(target)
        shutil.rmtree(earlier, ignore_errors=True)
    barrier()


def _tables(stage: MultimodalStage) -> list[list[StageTensor]]:
    return stage_tables(stage.shape, stage.layout.tensor_size, stage.layout.pipeline_size)


def _export_plan(stage: MultimodalStage) -> HuggingFacePlan:
    """Return the plan with one file per pipeline stage, its tensors in alphabetical order; equal on every rank."""
    shapes, hub_name = expected_shapes(stage.shape), stage.shape.family.hub_name
    written: set[str] = set()
    files = []
    for table in _tables(stage):
        # Tied embeddings are written once, and adapters not by themselves.
        names = {name for tensor in table if not is_adapter(tensor.name) for name in tensor.sources} - written
        written |= names
        files.append(sorted(TensorEntry(hub_name(name), stage.dtype, shapes[name]) for name in names))
    return HuggingFacePlan(files)
