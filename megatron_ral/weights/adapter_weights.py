"""Low-rank adapters of one rank's stage: filled at the start of a run, and written as a PEFT folder."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from megatron_ral.models.adapters import is_adapter
from megatron_ral.models.multimodal import MultimodalStage
from megatron_ral.models.parameter_shapes import adapter_shapes
from megatron_ral.parallel.collectives import barrier
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.runtime.progress import tick
from megatron_ral.weights.peft_folder import fill_folder, new_factor, read_adapters
from megatron_ral.weights.safetensors_files import SafetensorsFile, SafetensorsWriter, TensorEntry
from megatron_ral.weights.stream import Gathered, is_whole, own_tensors
from megatron_ral.weights.tensor_table import StageTensor, stage_tables


def adapter_table(stage: MultimodalStage) -> list[StageTensor]:
    """Return the factors of a stage's adapters."""
    table = stage_tables(stage.shape, stage.layout.tensor_size, stage.layout.pipeline_size)[stage.layout.pipeline_rank]
    return [tensor for tensor in table if is_adapter(tensor.name)]


@torch.no_grad()
def load_adapters(stage: MultimodalStage, path: str, seed: int, require_finite: bool = True) -> None:
    """Fill the adapters of a stage, if it has any.

    Args:
        stage: This rank's stage.
        path: PEFT folder; empty for new adapters.
        seed: Seed of new adapters.
        require_finite: Refuse values that are not finite.

    Raises:
        ConfigError, CheckpointError: as `peft_folder.read_adapters`.
    """
    if stage.shape.adapter is None:
        return
    parameters, sizes = dict(stage.named_parameters()), adapter_shapes(stage.shape)
    stored = read_adapters(path, stage.shape, require_finite) if path else None
    for tensor in adapter_table(stage):
        tick()
        factors = [new_factor(name, sizes[name], seed) if stored is None else stored[name] for name in tensor.sources]
        parameters[tensor.name].copy_(
            tensor.cut(tensor.merge(factors), stage.layout.tensor_rank, stage.layout.tensor_size)
        )


@torch.no_grad()
def export_adapters(
    stage: MultimodalStage, process_groups: ProcessGroups, base: str, output: str, gathered: Gathered = is_whole
) -> None:
    """Write the adapters as a PEFT folder. Every rank calls this.

    Each pipeline stage writes its part, and the first rank joins the parts tensor by tensor.

    Args:
        stage: This rank's stage, with adapters.
        process_groups: Process groups.
        base: Folder of the base model, which the PEFT folder names.
        output: Folder to write. An existing one is replaced.
        gathered: Context of one parameter in which it is whole; by default all are whole already.
    """
    layout, target, sizes = process_groups.layout, Path(output), adapter_shapes(stage.shape)
    partial = target.with_name(target.name + ".partial")
    if layout.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    table, writes = adapter_table(stage), layout.tensor_rank == 0 and layout.data_rank == 0
    entries = [TensorEntry(name, stage.dtype, sizes[name]) for tensor in table for name in tensor.sources]
    writer = SafetensorsWriter(partial / f"stage_{layout.pipeline_rank}", entries) if writes else None
    for tensor in table:
        tick()
        values = own_tensors(tensor, stage.get_parameter(tensor.name), process_groups, gathered, writes)
        for factor, name in zip(values, tensor.sources):  # in this order, so that `values` runs to its end
            if writer is not None and factor is not None:
                writer.add(name, factor)
    if writer is not None:
        writer.close()
    barrier()
    if layout.rank == 0:
        parts = [SafetensorsFile(partial / f"stage_{number}") for number in range(layout.pipeline_size)]

        def joined(name: str) -> Tensor:
            return next(part for part in parts if name in part).read(name)

        fill_folder(partial, stage.shape, base, stage.dtype, joined)
        for number in range(layout.pipeline_size):
            (partial / f"stage_{number}").unlink()
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    barrier()
