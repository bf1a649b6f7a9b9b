"""Convert between Hugging Face folders and Megatron folders of any layout, tensor by tensor.

`weights.tensor_table` says how every parameter is merged, cut and joined. Both kinds of folder are read through
`Weights`, so that converting, resharding and exporting are one function for each target. Output is written under a
temporary name and renamed when it is complete.
"""

import itertools
import json
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Collection, Iterator, Optional

import torch

from megatron_ral.errors import CheckpointError, ConfigError
from megatron_ral.models.folder import MANIFEST
from megatron_ral.models.parameter_shapes import expected_shapes
from megatron_ral.models.shape import ModelShape, read_shape
from megatron_ral.weights.huggingface import HuggingFacePlan, HuggingFaceWeights, Weights, common_name, copy_config
from megatron_ral.weights.megatron import MegatronWeights, shard_file
from megatron_ral.weights.safetensors_files import SafetensorsWriter, TensorEntry
from megatron_ral.weights.tensor_table import stage_tables

Progress = Callable[[int], object]
"""Function that is called with the number of bytes just written."""

MAX_ROWS_SHOWN = 40
"""Number of differing tensors that an error lists."""


@dataclass(frozen=True)
class Converted:
    """Size and duration of a conversion."""

    num_bytes: int
    """Bytes of the tensors written."""
    seconds: float
    """Wall-clock time in seconds."""

    def __str__(self) -> str:
        rate = self.num_bytes / max(self.seconds, 1e-9) / 1e9
        return f"{self.num_bytes:,} bytes in {self.seconds:.1f} s, {rate:.3f} GB/s"


def open_weights(path: str | Path) -> Weights:
    """Return the weights of a model folder: Megatron if it has a manifest, otherwise Hugging Face.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    return MegatronWeights(path) if (Path(path) / MANIFEST).is_file() else HuggingFaceWeights(path)


def check_weights(weights: Weights, shape: ModelShape) -> None:
    """Compare the names and shapes of weights with those of the architecture. No tensor is read.

    Raises:
        CheckpointError: with a table of missing, unexpected and mis-shaped tensors, or one sentence where a part that a
            wrapper put into the names explains them.
    """
    wanted = expected_shapes(shape)
    unexpected = set(weights) - set(wanted)
    _refuse_wrapped_names(weights, set(wanted) - set(weights), unexpected)
    rows = [("missing", name, str(wanted[name])) for name in wanted if name not in weights]
    rows += [("unexpected", name, str(weights.shape_of(name))) for name in sorted(unexpected)]
    rows += [
        ("mis-shaped", name, f"{weights.shape_of(name)} instead of {size}")
        for name, size in wanted.items()
        if name in weights and weights.shape_of(name) != size
    ]
    if rows:
        table = "\n".join(f"  {kind:<11} {name:<60} {size}" for kind, name, size in rows[:MAX_ROWS_SHOWN])
        more = f"\n  ... and {len(rows) - MAX_ROWS_SHOWN} more" if len(rows) > MAX_ROWS_SHOWN else ""
        raise CheckpointError(f"'{weights.path}'", None, f"does not fit its config.json:\n{table}{more}")


def _refuse_wrapped_names(weights: Weights, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise CheckpointError where most of the missing weights are there with a part in their names from a wrapper."""
    found: dict[tuple[bool, str], list[str]] = {}
    for name in sorted(unexpected):
        parts = name.split(".")
        for start, stop in itertools.combinations(range(len(parts)), 2):
            if common_name(".".join(parts[:start] + parts[stop:])) in missing:
                found.setdefault((start == 0, ".".join(parts[start:stop]) + "."), []).append(name)
    (is_prefix, part), names = max(found.items(), key=lambda item: len(item[1]), default=((True, ""), []))
    if 2 * len(names) > len(missing):
        kind = "prefix" if is_prefix else "part"
        place = f"{'under' if is_prefix else 'with'} the {kind} '{part}' of a wrapper{'' if is_prefix else ' in it'}"
        raise CheckpointError(
            f"'{weights.path}'",
            None,
            f"has {len(names)} of its {len(weights)} weights {place} (first: '{names[0]}'); save the model inside the "
            f"wrapper (a merged one after merge_and_unload), or rename them without the {kind}",
        )


def to_megatron(
    source: str | Path,
    output: str | Path,
    tensor_size: int,
    pipeline_size: int,
    progress: Progress = lambda num_bytes: None,
) -> Converted:
    """Write a model folder, Hugging Face or Megatron, as a Megatron folder of the given layout.

    Only one parameter and its Hugging Face tensors are in memory at a time.

    Args:
        source: Model folder to read.
        output: Folder to write; it must not exist.
        tensor_size: Number of tensor-parallel ranks of the output.
        pipeline_size: Number of pipeline stages of the output.
        progress: Function that is called after each tensor.

    Raises:
        CheckpointError: `source` is damaged or does not fit its config.json.
        ConfigError: `source` is no model folder, the layout does not divide the model, or `output` exists.
    """
    started = time.perf_counter()
    shape = read_shape(str(source), "the checkpoint")
    shape.check_layout(tensor_size, pipeline_size)
    weights = open_weights(source)
    check_weights(weights, shape)
    moved = 0
    with renamed_when_complete(output) as partial:
        for stage, table in enumerate(stage_tables(shape, tensor_size, pipeline_size)):
            entries = [
                TensorEntry(
                    tensor.name,
                    weights.dtype_of(tensor.sources[0]),
                    tensor.shard_shape(weights.shape_of, tensor_size),
                )
                for tensor in table
            ]
            files = [SafetensorsWriter(partial / shard_file(rank, stage), entries) for rank in range(tensor_size)]
            for tensor in table:
                full = tensor.merge([weights[name] for name in tensor.sources])
                written = 0
                for rank, file in enumerate(files):
                    written += file.add(tensor.name, tensor.cut(full, rank, tensor_size))
                del full
                moved += written
                progress(written)
            for file in files:
                file.close()
        copy_config(source, partial / "hf")
        sizes = {path.name: path.stat().st_size for path in sorted(partial.glob("*.safetensors"))}
        manifest = {"format": 1, "tensor_parallel": tensor_size, "pipeline_parallel": pipeline_size, "files": sizes}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2))
    return Converted(moved, time.perf_counter() - started)


def to_hf(
    source: str | Path,
    output: str | Path,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress = lambda num_bytes: None,
    weights: Optional[Weights] = None,
    format_tags: Optional[str] = None,
) -> Converted:
    """Write a model folder, Hugging Face or Megatron, as a Hugging Face folder.

    Args:
        source: Model folder to read.
        output: Folder to write; it must not exist.
        max_shard_bytes: Bytes after which a new weight file begins.
        progress: Function that is called after each tensor.
        weights: Weights to write instead of those of `source`, which then gives config, tokenizer and processor.
        format_tags: model.format_tags of the run that the weights are of, by which the tokenizer is edited; None: it is
            copied as it is.

    Raises:
        CheckpointError: `source` is damaged or does not fit its config.json.
        ConfigError: `source` is no model folder, or `output` exists.
    """
    started = time.perf_counter()
    shape = read_shape(str(source), "the checkpoint")
    weights = open_weights(source) if weights is None else weights
    check_weights(weights, shape)
    files: list[list[str]] = [[]]
    entries: list[list[TensorEntry]] = [[]]
    size = 0
    for name in weights:
        entry = TensorEntry(shape.family.hub_name(name), weights.dtype_of(name), weights.shape_of(name))
        if files[-1] and size + entry.num_bytes > max_shard_bytes:
            files.append([])
            entries.append([])
            size = 0
        files[-1].append(name)
        entries[-1].append(entry)
        size += entry.num_bytes
    plan = HuggingFacePlan(entries)
    with renamed_when_complete(output) as partial:
        for number, names in enumerate(files):
            writer = plan.open_file(partial, number)
            for name in names:
                progress(writer.add(shape.family.hub_name(name), weights[name]))
            writer.close()
        plan.finish(partial, source, format_tags)
    return Converted(plan.num_bytes, time.perf_counter() - started)


def differing_weights(first: str | Path, second: str | Path) -> list[str]:
    """Return the common names of all weights that differ between two model folders.

    A weight differs if only one folder has it, if its type or any bit differs, or if a Megatron folder has copies of it
    that differ. Only one tensor of each folder is in memory at a time.
    """
    left, right = open_weights(first), open_weights(second)
    differing = sorted(set(left) ^ set(right))
    for name in left:
        if name in right:
            ours = left[name]
            others = [
                right[name],
                *(copy for side in (left, right) if isinstance(side, MegatronWeights) for copy in side.copies(name)),
            ]
            if any(ours.dtype != other.dtype or not torch.equal(ours, other) for other in others):
                differing.append(name)
    return differing


@contextmanager
def renamed_when_complete(output: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder. It becomes `output` if the block ends well, and is removed if it does not.

    Raises:
        ConfigError: `output` exists.
    """
    output = Path(output)
    if output.exists():
        raise ConfigError("--output", output, "exists already; give another folder")
    partial = output.absolute().with_name(f".{output.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.rename(partial, output.absolute())
    finally:
        shutil.rmtree(partial, ignore_errors=True)
