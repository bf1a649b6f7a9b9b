"""Between Hugging Face folders and Megatron folders of any layout, tensor by tensor.

The table of `weights.stage_tensors` says how every parameter is merged, cut and joined. A Megatron folder is read back
through `MegatronWeights`, which looks like a Hugging Face folder; converting, resharding and exporting are then one
function each. Everything is written to a temporary name and renamed when whole, the manifest last.
"""

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Optional

import torch
from torch import Tensor

from megatron_ral.errors import CheckpointError, ConfigError
from megatron_ral.models.families import build_tower
from megatron_ral.models.folder import MANIFEST, read_json
from megatron_ral.models.shape import ModelShape, read_shape
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.weights.folders import (
    INDEX,
    HuggingFaceWeights,
    SafetensorsFile,
    SafetensorsWriter,
    Weights,
    copy_config,
)
from megatron_ral.weights.tensor_table import StageTensor, stage_tensors

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Converted:
    """What a conversion moved."""

    num_bytes: int
    seconds: float

    def __str__(self) -> str:
        rate = self.num_bytes / max(self.seconds, 1e-9) / 1e9
        return f"{self.num_bytes:,} bytes in {self.seconds:.1f} s, {rate:.3f} GB/s"


def visual_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names inside the vision tower with their shapes, built without memory."""
    with torch.device("meta"):
        tower = build_tower(shape.vision)
    return {name: tuple(parameter.shape) for name, parameter in tower.named_parameters()}


def expected_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of this shape by our name."""
    H, D = shape.hidden_size, shape.kv_channels
    query, key = shape.num_attention_heads * D, shape.num_query_groups * D
    result = {f"visual.{name}": size for name, size in visual_shapes(shape).items()}
    result["model.embed_tokens.weight"] = (shape.vocab_size, H)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        for part, rows in (("q", query), ("k", key), ("v", key)):
            result[f"{prefix}.self_attn.{part}_proj.weight"] = (rows, H)
            if shape.family.qkv_bias:
                result[f"{prefix}.self_attn.{part}_proj.bias"] = (rows,)
            if shape.family.qk_norm and part != "v":
                result[f"{prefix}.self_attn.{part}_norm.weight"] = (D,)
        result[f"{prefix}.self_attn.o_proj.weight"] = (H, query)
        for part in ("gate", "up"):
            result[f"{prefix}.mlp.{part}_proj.weight"] = (shape.ffn_hidden_size, H)
        result[f"{prefix}.mlp.down_proj.weight"] = (H, shape.ffn_hidden_size)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            result[f"{prefix}.{norm}.weight"] = (H,)
    result["model.norm.weight"] = (H,)
    if not shape.tie_word_embeddings:
        result["lm_head.weight"] = (shape.vocab_size, H)
    return result


def check_weights(weights: Weights, shape: ModelShape) -> None:
    """Compare names and shapes with what the architecture has, reading no tensor.

    Raises:
        CheckpointError: with a table of missing, unexpected and mis-shaped tensors.
    """
    wanted = expected_shapes(shape)
    unexpected = set(weights) - set(wanted) - ({"lm_head.weight"} if shape.tie_word_embeddings else set())
    rows = [("missing", name, str(wanted[name])) for name in wanted if name not in weights]
    rows += [("unexpected", name, str(weights.shape_of(name))) for name in sorted(unexpected)]
    rows += [
        ("mis-shaped", name, f"{weights.shape_of(name)} instead of {size}")
        for name, size in wanted.items()
        if name in weights and weights.shape_of(name) != size
    ]
    if rows:
        table = "\n".join(f"  {kind:<11} {name:<60} {size}" for kind, name, size in rows[:40])
        more = f"\n  ... and {len(rows) - 40} more" if len(rows) > 40 else ""
        raise CheckpointError(f"'{weights.path}' does not fit its config.json:\n{table}{more}")


class MegatronWeights(Weights):
    """A Megatron folder, seen as Hugging Face's tensors: joined over tensor ranks, then taken apart."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        manifest = read_json(self.path / MANIFEST, "tensor_parallel", "pipeline_parallel", "files")
        self.tensor_size, self.pipeline_size = manifest["tensor_parallel"], manifest["pipeline_parallel"]
        for file, size in manifest["files"].items():
            if not (self.path / file).is_file() or (self.path / file).stat().st_size != size:
                raise CheckpointError(f"'{self.path}': file '{file}' is missing or cut short")
        self.shape = read_shape(str(self.path))
        self._shapes = expected_shapes(self.shape)
        self._where: dict[str, tuple[int, StageTensor]] = {}
        self._tied: dict[str, tuple[int, StageTensor]] = {}
        for stage, table in stage_tables(self.shape, self.tensor_size, self.pipeline_size):
            for tensor in table:
                for source in tensor.sources:
                    places = self._tied if source in self._where else self._where
                    places[source] = (stage, tensor)
        self._files = {
            (rank, stage): SafetensorsFile(self.path / shard_file(rank, stage))
            for rank in range(self.tensor_size)
            for stage in range(self.pipeline_size)
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name, *self._where[name], first_rank=0)

    def copies(self, name: str) -> Iterator[Tensor]:
        """The other copies of a tensor that is held several times: on every tensor rank, or tied on the last stage."""
        stage, tensor = self._where[name]
        if tensor.cut_dim is None:
            for rank in range(1, self.tensor_size):
                yield self._read(name, stage, tensor, first_rank=rank)
        if name in self._tied:
            yield self._read(name, *self._tied[name], first_rank=0)

    def _read(self, name: str, stage: int, tensor: StageTensor, first_rank: int) -> Tensor:
        ranks = range(self.tensor_size) if tensor.cut_dim is not None else (first_rank,)
        shards = (self._files[rank, stage].read(tensor.name) for rank in ranks)
        full = tensor.join(shards, self.tensor_size)
        return tensor.split(full)[tensor.sources.index(name)]

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype_of(self, name: str) -> torch.dtype:
        stage, tensor = self._where[name]
        return self._files[0, stage].dtypes[tensor.name]


def open_weights(path: str | Path) -> Weights:
    """A Megatron folder where there is a manifest, else a Hugging Face folder."""
    return MegatronWeights(path) if (Path(path) / MANIFEST).is_file() else HuggingFaceWeights(path)


def shard_file(tensor_rank: int, stage: int) -> str:
    return f"tp_{tensor_rank:02d}_pp_{stage:02d}.safetensors"


def stage_tables(shape: ModelShape, tensor_size: int, pipeline_size: int) -> Iterator[tuple[int, list[StageTensor]]]:
    names = list(visual_shapes(shape))
    for stage in range(pipeline_size):
        layout = RankLayout(stage, pipeline_size, 1, pipeline_size)
        yield (
            stage,
            list(
                stage_tensors(
                    shape,
                    layout.stage_layers(shape.num_layers),
                    layout.is_first_stage,
                    layout.is_last_stage,
                    tensor_size,
                    names,
                )
            ),
        )


def to_megatron(
    source: str | Path,
    output: str | Path,
    tensor_size: int,
    pipeline_size: int,
    progress: Progress = lambda num_bytes: None,
) -> Converted:
    """Write `source` (Hugging Face or Megatron folder) as a Megatron folder of the given layout.

    At most the Hugging Face tensors of one parameter and that parameter are in memory at a time.

    Raises:
        CheckpointError, ConfigError: damaged source, contradiction with its config.json, impossible layout, or an
            output that exists.
    """
    started = time.perf_counter()
    shape = read_shape(str(source), "the checkpoint")
    shape.check_layout(tensor_size, pipeline_size)
    weights = open_weights(source)
    check_weights(weights, shape)
    partial, moved = _begin(output), 0
    try:
        for stage, table in stage_tables(shape, tensor_size, pipeline_size):
            files = [
                SafetensorsWriter(partial / shard_file(rank, stage), _shard_entries(table, weights, shape, tensor_size))
                for rank in range(tensor_size)
            ]
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
        _finish(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Converted(moved, time.perf_counter() - started)


def to_hf(
    source: str | Path,
    output: str | Path,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress = lambda num_bytes: None,
    weights: Optional[Weights] = None,
) -> Converted:
    """Write `source` as a Hugging Face folder, sharded like the hub's with an index.

    Args:
        weights: what to write in place of the weights of `source`, which then gives all else.

    Raises:
        CheckpointError, ConfigError: as for `to_megatron`.
    """
    started = time.perf_counter()
    shape = read_shape(str(source), "the checkpoint")
    weights = open_weights(source) if weights is None else weights
    check_weights(weights, shape)
    plan: list[list[str]] = [[]]
    size_of = {name: weights.dtype_of(name).itemsize * torch.Size(weights.shape_of(name)).numel() for name in weights}
    held = 0
    for name in weights:
        if plan[-1] and held + size_of[name] > max_shard_bytes:
            plan.append([])
            held = 0
        plan[-1].append(name)
        held += size_of[name]
    partial, weight_map = _begin(output), {}
    try:
        for number, names in enumerate(plan, 1):
            file = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
            hub = {name: shape.family.hub_name(name) for name in names}
            writer = SafetensorsWriter(
                partial / file, [(hub[n], weights.dtype_of(n), weights.shape_of(n)) for n in names]
            )
            for name in names:
                progress(writer.add(hub[name], weights[name]))
                weight_map[hub[name]] = file
            writer.close()
        copy_config(source, partial)
        index = {"metadata": {"total_size": sum(size_of.values())}, "weight_map": weight_map}
        (partial / INDEX).write_text(json.dumps(index, indent=2))
        _finish(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Converted(sum(size_of.values()), time.perf_counter() - started)


def differing_weights(first: str | Path, second: str | Path) -> list[str]:
    """Hub names that are in one folder only, or whose bits differ, or of which a Megatron folder holds copies that
    differ; one tensor of each in memory at a time."""
    left, right = open_weights(first), open_weights(second)
    apart = sorted(set(left) ^ set(right))
    for name in left:
        if name in right:
            ours = left[name]
            others = [
                right[name],
                *(copy for side in (left, right) if isinstance(side, MegatronWeights) for copy in side.copies(name)),
            ]
            if any(ours.dtype != other.dtype or not torch.equal(ours, other) for other in others):
                apart.append(name)
    return apart


def _shard_entries(table: list[StageTensor], weights: Weights, shape: ModelShape, tensor_size: int):
    """(name, dtype, shape of one rank's shard), found on meta tensors."""
    entries = []
    for tensor in table:
        sources = [torch.empty(weights.shape_of(name), device="meta") for name in tensor.sources]
        shard = tensor.cut(tensor.merge(sources), 0, tensor_size)
        entries.append((tensor.name, weights.dtype_of(tensor.sources[0]), tuple(shard.shape)))
    return entries


def _begin(output: str | Path) -> Path:
    output = Path(output)
    if output.exists():
        raise ConfigError(f"--output '{output}' exists already; give another folder")
    partial = output.absolute().with_name(f".{output.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _finish(partial: Path, output: str | Path) -> None:
    os.rename(partial, Path(output).absolute())
