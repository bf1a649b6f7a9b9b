"""Between Hugging Face tensors and one rank's stage: names, fused layouts, tensor-parallel cuts.

One table describes every parameter (`stage_tensors`); loading and exporting both follow it. Fused layouts of
megatron-core: `linear_qkv` interleaves per key/value group [q of the group, k, v]; `linear_fc1` is [gate; up] on every
rank. Checkpoints are read from safetensors only, tensor by tensor; nothing is unpickled.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Mapping, Optional, Sequence

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_ral.models.multimodal import MultimodalStage
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.collectives import barrier, gather_objects, gather_shards
from megatron_ral.parallel.groups import ParallelGroups


class CheckpointError(ValueError):
    """A checkpoint that does not hold what the model needs; the message lists what is missing or mis-shaped."""


@dataclass(frozen=True)
class StageTensor:
    """One parameter of a stage and its Hugging Face tensors."""

    name: str
    """Name inside MultimodalStage."""
    sources: tuple[str, ...]
    """Names in the Hugging Face folder."""
    merge: Callable[[list[Tensor]], Tensor]
    """Hugging Face tensors -> full parameter (all tensor ranks)."""
    split: Callable[[Tensor], list[Tensor]]
    """Inverse of merge."""
    cut_dim: Optional[int]
    """Dimension cut over tensor ranks; None: every rank holds a copy."""
    interleaved: int = 1
    """Equal blocks along cut_dim, each of which is cut by itself (2 for [gate; up])."""

    def cut(self, full: Tensor, tensor_rank: int, tensor_size: int) -> Tensor:
        """This rank's shard of the full parameter."""
        if self.cut_dim is None or tensor_size == 1:
            return full
        blocks = full.chunk(self.interleaved, dim=self.cut_dim)
        return torch.cat([block.chunk(tensor_size, dim=self.cut_dim)[tensor_rank] for block in blocks], self.cut_dim)

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """Full parameter from the shards of all tensor ranks."""
        if self.cut_dim is None or len(shards) == 1:
            return shards[0]
        parts = [shard.chunk(self.interleaved, dim=self.cut_dim) for shard in shards]
        return torch.cat([part[block] for block in range(self.interleaved) for part in parts], self.cut_dim)


def _one(tensors: list[Tensor]) -> Tensor:
    return tensors[0]


def _same(full: Tensor) -> list[Tensor]:
    return [full]


def _halves(full: Tensor) -> list[Tensor]:
    return list(full.chunk(2))


def _qkv_layout(shape: ModelShape) -> tuple[Callable, Callable]:
    """[q; k; v] as three Hugging Face tensors <-> one tensor interleaved per key/value group."""
    K, D, m = shape.num_query_groups, shape.kv_channels, shape.num_attention_heads // shape.num_query_groups

    def merge(tensors: list[Tensor]) -> Tensor:
        rest = tensors[0].shape[1:]
        parts = [tensor.reshape(K, -1, *rest) for tensor in tensors]
        return torch.cat(parts, dim=1).reshape(-1, *rest)

    def split(full: Tensor) -> list[Tensor]:
        rest = full.shape[1:]
        parts = full.reshape(K, (m + 2) * D, *rest).split([m * D, D, D], dim=1)
        return [part.reshape(-1, *rest) for part in parts]

    return merge, split


def stage_tensors(shape: ModelShape, layers: range, first: bool, last: bool,
                  visual_names: Sequence[str] = ()) -> Iterator[StageTensor]:
    """Every parameter of a stage that holds `layers`, in module order.

    Args:
        shape: model.
        layers: 0-based layers of the stage.
        first, last: whether it is the first / last stage.
        visual_names: parameter names inside the vision tower (first stage).
    """
    for name in visual_names if first else ():
        yield StageTensor(f"visual.{name}", (f"visual.{name}",), _one, _same, None)
    if first:
        yield StageTensor("language.embedding.word_embeddings.weight", ("model.embed_tokens.weight",), _one, _same, 0)
    qkv_merge, qkv_split = _qkv_layout(shape)
    for index, layer in enumerate(layers):
        ours, theirs = f"language.decoder.layers.{index}", f"model.layers.{layer}"
        attention = f"{theirs}.self_attn"
        yield StageTensor(f"{ours}.input_layernorm.weight", (f"{theirs}.input_layernorm.weight",), _one, _same, None)
        for kind in ("weight", "bias"):
            sources = tuple(f"{attention}.{part}_proj.{kind}" for part in "qkv")
            yield StageTensor(f"{ours}.self_attention.linear_qkv.{kind}", sources, qkv_merge, qkv_split, 0)
        yield StageTensor(f"{ours}.self_attention.linear_proj.weight", (f"{attention}.o_proj.weight",), _one, _same, 1)
        yield StageTensor(f"{ours}.pre_mlp_layernorm.weight", (f"{theirs}.post_attention_layernorm.weight",), _one,
                          _same, None)
        yield StageTensor(f"{ours}.mlp.linear_fc1.weight",
                          (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight"), torch.cat, _halves, 0, 2)
        yield StageTensor(f"{ours}.mlp.linear_fc2.weight", (f"{theirs}.mlp.down_proj.weight",), _one, _same, 1)
    if last:
        yield StageTensor("language.decoder.final_layernorm.weight", ("model.norm.weight",), _one, _same, None)
        if not shape.tie_word_embeddings:
            yield StageTensor("language.output_layer.weight", ("lm_head.weight",), _one, _same, 0)
        elif not first:
            yield StageTensor("language.output_layer.weight", ("model.embed_tokens.weight",), _one, _same, 0)


def describe_stage(stage: MultimodalStage) -> list[StageTensor]:
    """The table of a built stage, checked against its parameters.

    Also marks each parameter with `tensor_model_parallel`, which DeepSpeed and the engine read when they count a
    gradient norm (megatron-core sets it only when it initialises the weights itself).
    """
    layout = stage.layout
    visual_names = [name for name, _ in stage.visual.named_parameters()] if stage.visual is not None else []
    table = list(stage_tensors(stage.shape, layout.stage_layers(stage.shape.num_layers), layout.is_first_stage,
                               layout.is_last_stage, visual_names))
    parameters = dict(stage.named_parameters())
    assert {tensor.name for tensor in table} == set(parameters)
    for tensor in table:
        parameters[tensor.name].tensor_model_parallel = tensor.cut_dim is not None
    return table


class HuggingFaceWeights(Mapping[str, Tensor]):
    """Tensors of a Hugging Face folder by hub name (`model.layers..`, `visual..`, `lm_head..`), read on demand."""

    def __init__(self, path: str):
        self.path = Path(path)
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            try:
                files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
                raise CheckpointError(f"'{index}' is not a safetensors index ({error!r})") from None
        else:
            files = ["model.safetensors"]
        self._handles, self._where = {}, {}
        for file in files:
            if not (self.path / file).is_file():
                raise CheckpointError(f"'{self.path}' has no file '{file}'")
            try:
                handle = safe_open(str(self.path / file), framework="pt")
            except Exception as error:  # safetensors raises its own type for every kind of damage
                raise CheckpointError(f"'{self.path / file}' is not a whole safetensors file ({error})") from None
            for name in handle.keys():
                self._where[_hub_name(name)] = (handle, name)

    def __getitem__(self, name: str) -> Tensor:
        handle, stored = self._where[name]
        return handle.get_tensor(stored)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._where

    def shape_of(self, name: str) -> tuple[int, ...]:
        handle, stored = self._where[name]
        return tuple(handle.get_slice(stored).get_shape())

    def __iter__(self):
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _hub_name(name: str) -> str:
    """Names as transformers 5 keeps them in memory -> names as they are on the hub."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


@torch.no_grad()
def load_stage(stage: MultimodalStage, path: str) -> None:
    """Fill a stage from a Hugging Face folder.

    Raises:
        CheckpointError: missing or mis-shaped tensors, all of them listed.
    """
    weights = HuggingFaceWeights(path)
    parameters, layout, problems = dict(stage.named_parameters()), stage.layout, []
    for tensor in describe_stage(stage):
        missing = [source for source in tensor.sources if source not in weights]
        if missing:
            problems += [f"missing {name}" for name in missing]
            continue
        shapes = [weights.shape_of(source) for source in tensor.sources]
        try:
            full = tensor.merge([weights[source] for source in tensor.sources])
            shard = tensor.cut(full, layout.tensor_rank, layout.tensor_size)
            parameters[tensor.name].copy_(shard)
        except RuntimeError:
            problems.append(f"{' + '.join(tensor.sources)} of shape {shapes} does not fit "
                            f"{tensor.name} {tuple(parameters[tensor.name].shape)}")
    if problems:
        raise CheckpointError(f"'{path}' does not fit the model:\n  " + "\n  ".join(problems))


@torch.no_grad()
def export_stage(stage: MultimodalStage, groups: ParallelGroups, source: str, output: str) -> None:
    """Write the model as a Hugging Face folder; every rank calls it, parameters resident.

    Each pipeline stage writes one safetensors file; the index, the configuration and the tokenizer are written last,
    into a temporary folder that is renamed when whole.

    Args:
        source: Hugging Face folder the run started from; everything but its weights is carried along.
        output: folder to write; an earlier one is replaced.
    """
    layout, target = groups.layout, Path(output)
    partial = target.with_name(target.name + ".partial")
    if layout.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    parameters, tensors = dict(stage.named_parameters()), {}
    for tensor in describe_stage(stage):
        parameter = parameters[tensor.name]
        if getattr(parameter, "shared", False):
            continue  # the last stage's copy of tied embeddings
        shards = gather_shards(parameter.detach(), groups.tensor) if tensor.cut_dim is not None else [parameter]
        if layout.tensor_rank == 0 and layout.data_rank == 0:
            for name, value in zip(tensor.sources, tensor.split(tensor.join(shards))):
                tensors[name] = value.detach().cpu().contiguous().clone()
    file = f"model-{layout.pipeline_rank + 1:05d}-of-{layout.pipeline_size:05d}.safetensors"
    if layout.tensor_rank == 0 and layout.data_rank == 0:
        save_file(tensors, partial / file, metadata={"format": "pt"})
    written = gather_objects((file, sorted(tensors), sum(t.numel() * t.element_size() for t in tensors.values())),
                             groups.pipeline)
    barrier()
    if layout.rank == 0:
        weight_map = {name: file for file, names, _ in written for name in names}
        index = {"metadata": {"total_size": sum(size for _, _, size in written)}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        for path in Path(source).iterdir():
            if path.is_file() and path.suffix != ".safetensors" and path.name != "model.safetensors.index.json":
                shutil.copy(path, partial / path.name)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    barrier()
