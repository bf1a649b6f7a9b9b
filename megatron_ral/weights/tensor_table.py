"""Table of all parameters of a pipeline stage: their Hugging Face tensors, how to merge them, how to cut the result.

Loading, exporting, converting and resharding all follow this table. megatron-core fuses some parameters: `linear_qkv`
interleaves [queries, key, value] of each key/value head, and `linear_fc1` is [gate; up] on every tensor rank. No module
is built here.
"""

from dataclasses import dataclass
from typing import Callable, Iterable, Iterator, Optional, Sequence

import torch
from torch import Tensor

from megatron_ral.models.adapters import FUSED, adapted_parts, adapter_weight
from megatron_ral.models.linear_attention import LinearAttentionShape
from megatron_ral.models.parameter_shapes import matrix_shape, visual_shapes
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.weights.huggingface import Weights


@dataclass(frozen=True)
class StageTensor:
    """One parameter of a stage, and the Hugging Face tensors that it is made of."""

    name: str
    """Name inside `MultimodalStage`."""
    sources: tuple[str, ...]
    """Common names of the Hugging Face tensors."""
    merge: Callable[[list[Tensor]], Tensor]
    """Function from the Hugging Face tensors to the full parameter of all tensor ranks."""
    split: Callable[[Tensor], list[Tensor]]
    """Inverse of `merge`."""
    cut_dim: Optional[int]
    """Dimension that is cut over tensor ranks; None where every rank holds a copy."""
    interleaved: int = 1
    """Number of equal blocks along `cut_dim`, each of which is cut by itself (2 for [gate; up])."""
    merge_parts: Optional[Callable[[list[Tensor]], Tensor]] = None
    """Function from one rank's parts of the Hugging Face tensors to its shard; None where whole tensors are needed."""
    real_rows: int = 0
    """Number of rows of the full parameter without the vocabulary's padding; 0: all of them."""

    def cut(self, full: Tensor, tensor_rank: int, tensor_size: int) -> Tensor:
        """Return a tensor rank's shard of the full parameter."""
        if self.cut_dim is None or tensor_size == 1:
            return full
        blocks = full.chunk(self.interleaved, dim=self.cut_dim)
        return torch.cat([block.chunk(tensor_size, dim=self.cut_dim)[tensor_rank] for block in blocks], self.cut_dim)

    def shard_shape(self, shape_of: Callable[[str], Sequence[int]], tensor_size: int) -> tuple[int, ...]:
        """Return the shape of every tensor rank's shard.

        Args:
            shape_of: Function from the common name of a Hugging Face tensor to its shape.
            tensor_size: Number of tensor-parallel ranks.
        """
        sources = [torch.empty(tuple(shape_of(name)), device="meta") for name in self.sources]
        return tuple(self.cut(self.merge(sources), 0, tensor_size).shape)

    def read(self, weights: Weights, tensor_rank: int, tensor_size: int) -> Tensor:
        """Return a tensor rank's shard from a checkpoint, reading only its bytes where `merge_parts` allows that."""
        if self.cut_dim is None or tensor_size == 1 or self.merge_parts is None:
            return self.cut(self.merge([weights[name] for name in self.sources]), tensor_rank, tensor_size)
        parts = []
        for name in self.sources:
            length = weights.shape_of(name)[self.cut_dim]
            share = -(-length // tensor_size)  # the last ranks' vocabulary may be shorter
            start = min(tensor_rank * share, length)
            parts.append(weights.part(name, self.cut_dim, start, min(start + share, length)))
        return self.merge_parts(parts)

    def join(self, shards: Iterable[Tensor], tensor_size: int) -> Tensor:
        """Return the full parameter, given the shards of all tensor ranks in order.

        The shards are consumed one by one, so that an iterator needs to hold only one of them in memory.
        """
        full = None
        for rank, shard in enumerate(shards):
            if self.cut_dim is None or tensor_size == 1:
                return shard
            if full is None:
                size = list(shard.shape)
                size[self.cut_dim] *= tensor_size
                full = shard.new_empty(size)
            blocks = zip(full.chunk(self.interleaved, self.cut_dim), shard.chunk(self.interleaved, self.cut_dim))
            for whole, part in blocks:
                whole.chunk(tensor_size, self.cut_dim)[rank].copy_(part)
        assert full is not None
        return full


def _one(tensors: list[Tensor]) -> Tensor:
    return tensors[0]


def _same(full: Tensor) -> list[Tensor]:
    return [full]


def _padded(rows: int) -> Callable[[list[Tensor]], Tensor]:
    """Return a function that appends zero rows up to `rows` (vocabulary padding)."""

    def merge(tensors: list[Tensor]) -> Tensor:
        (full,) = tensors
        return torch.cat([full, full.new_zeros(rows - len(full), *full.shape[1:])]) if rows > len(full) else full

    return merge


def _first(rows: int) -> Callable[[Tensor], list[Tensor]]:
    return lambda full: [full[:rows]]


def _halves(full: Tensor) -> list[Tensor]:
    return list(full.chunk(2))


def _qkv_layout(shape: ModelShape, num_groups: int) -> tuple[Callable, Callable]:
    """Return `merge` and `split` of q, k and v: three tensors to one, interleaved per key/value head, and back.

    With an output gate transformers has a gate behind each query head, and megatron-core all gates of a key/value head
    behind all its queries.

    Args:
        shape: Shape of the model.
        num_groups: Number of key/value heads in the tensors.
    """
    K, D, m = num_groups, shape.kv_channels, shape.num_attention_heads // shape.num_query_groups
    kinds = 2 if shape.family.output_gate else 1  # queries, and gates

    def merge(tensors: list[Tensor]) -> Tensor:
        rest = tensors[0].shape[1:]
        queries = tensors[0].reshape(K, m, kinds, -1, *rest).transpose(1, 2)
        parts = [queries.reshape(K, -1, *rest), *(tensor.reshape(K, -1, *rest) for tensor in tensors[1:])]
        return torch.cat(parts, dim=1).reshape(-1, *rest)

    def split(full: Tensor) -> list[Tensor]:
        rest = full.shape[1:]
        queries, *parts = full.reshape(K, (m * kinds + 2) * D, *rest).split([m * kinds * D, D, D], dim=1)
        queries = queries.reshape(K, kinds, m, D, *rest).transpose(1, 2)
        return [part.reshape(-1, *rest) for part in (queries, *parts)]

    return merge, split


def _adapter(
    shape: ModelShape,
    layer: str,
    fused: str,
    weights: Sequence[str],
    join: Optional[tuple[Callable, Callable]] = None,
    interleaved: int = 1,
) -> Iterator[StageTensor]:
    """Yield A and B of the adapter of a matrix, or nothing if it has none.

    Args:
        shape: Shape of the model.
        layer: Name of the layer inside the stage.
        fused: Name of the matrix inside the layer, a key of `FUSED`.
        weights: Common names of the matrices that it is made of.
        join: `merge` and `split` of the rows of a column-parallel matrix; None: the matrix is row-parallel.
        interleaved: As for StageTensor, of a column-parallel matrix.
    """
    adapted = [part in adapted_parts(shape.adapter, fused) for part in FUSED[fused]]
    A, B = (
        tuple(adapter_weight(weight, factor) for weight, there in zip(weights, adapted) if there) for factor in "AB"
    )
    if not A:
        return
    name = f"{layer}.{fused}.adapter"
    if join is None:
        yield StageTensor(f"{name}.A", A, _one, _same, 1, 1, _one)
        yield StageTensor(f"{name}.B", B, _one, _same, None)
        return
    merge, split = join
    sizes = [matrix_shape(shape, weight)[0] for weight in weights]

    def merge_adapted(tensors: list[Tensor]) -> Tensor:
        given = iter(tensors)
        return merge(
            [
                next(given) if there else tensors[0].new_zeros(rows, tensors[0].shape[1])
                for rows, there in zip(sizes, adapted)
            ]
        )

    def split_adapted(full: Tensor) -> list[Tensor]:
        return [part for part, there in zip(split(full), adapted) if there]

    yield StageTensor(f"{name}.A", A, torch.cat, lambda full: list(full.chunk(len(A))), None)
    yield StageTensor(f"{name}.B", B, merge_adapted, split_adapted, 0, interleaved)


def _softmax_attention(shape: ModelShape, ours: str, theirs: str, tensor_size: int) -> Iterator[StageTensor]:
    """Yield the parameters of softmax attention of a layer.

    Args:
        shape: Shape of the model.
        ours: Name of the layer inside the stage.
        theirs: Common name of the layer.
        tensor_size: Number of tensor-parallel ranks.
    """
    qkv_merge, qkv_split = _qkv_layout(shape, shape.num_query_groups)
    whole_groups = shape.num_query_groups % tensor_size == 0
    qkv_parts = _qkv_layout(shape, shape.num_query_groups // tensor_size)[0] if whole_groups else None
    attention = f"{theirs}.self_attn"
    for kind in ("weight", "bias") if shape.family.qkv_bias else ("weight",):
        sources = tuple(f"{attention}.{part}_proj.{kind}" for part in "qkv")
        if kind == "weight":
            yield from _adapter(shape, ours, "self_attention.linear_qkv", sources, (qkv_merge, qkv_split))
        yield StageTensor(f"{ours}.self_attention.linear_qkv.{kind}", sources, qkv_merge, qkv_split, 0, 1, qkv_parts)
    yield from _adapter(shape, ours, "self_attention.linear_proj", (f"{attention}.o_proj.weight",))
    yield StageTensor(
        f"{ours}.self_attention.linear_proj.weight", (f"{attention}.o_proj.weight",), _one, _same, 1, 1, _one
    )
    for part in "qk" if shape.family.qk_norm else "":
        yield StageTensor(
            f"{ours}.self_attention.{part}_layernorm.weight",
            (f"{attention}.{part}_norm.weight",),
            _one,
            _same,
            None,
        )


def _linear_attention(linear: LinearAttentionShape, ours: str, theirs: str) -> Iterator[StageTensor]:
    """Yield the parameters of linear attention of a layer.

    Args:
        linear: Sizes of the layer.
        ours: Name of the module inside the stage.
        theirs: Common name of the module.
    """
    inputs = tuple(f"{theirs}.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a"))
    yield StageTensor(f"{ours}.dt_bias", (f"{theirs}.dt_bias",), _one, _same, 0, 1, _one)
    yield StageTensor(f"{ours}.A_log", (f"{theirs}.A_log",), _one, _same, 0, 1, _one)
    yield StageTensor(f"{ours}.in_proj.weight", inputs, linear.merge_inputs, linear.split_inputs, 0)
    yield StageTensor(f"{ours}.out_proj.weight", (f"{theirs}.out_proj.weight",), _one, _same, 1, 1, _one)
    yield StageTensor(f"{ours}.conv1d.weight", (f"{theirs}.conv1d.weight",), linear.merge_conv, linear.split_conv, 0)
    yield StageTensor(f"{ours}.out_norm.weight", (f"{theirs}.norm.weight",), _one, _same, None)


def stage_tensors(
    shape: ModelShape, layers: range, first: bool, last: bool, tensor_size: int, visual_names: Sequence[str] = ()
) -> Iterator[StageTensor]:
    """Yield every parameter of a stage in module order, but for adapters, which come before their matrices.

    Args:
        shape: Shape of the model.
        layers: 0-based layers of the stage.
        first: True for the first stage, which has the embeddings and the vision tower.
        last: True for the last stage, which has the LM head.
        tensor_size: Number of tensor-parallel ranks, which decides the padding of the vocabulary.
        visual_names: Names of the parameters inside the vision tower.
    """
    padded_rows = shape.padded_vocab_size(tensor_size)
    vocabulary = (
        _padded(padded_rows),
        _first(shape.vocab_size),
        0,
        1,
        _padded(padded_rows // tensor_size),
        shape.vocab_size,
    )
    for name in visual_names if first else ():
        yield StageTensor(f"visual.{name}", (f"visual.{name}",), _one, _same, None)
    if first:
        yield StageTensor("language.embedding.word_embeddings.weight", ("model.embed_tokens.weight",), *vocabulary)
    for index, layer in enumerate(layers):
        ours, theirs = f"language.decoder.layers.{index}", f"model.layers.{layer}"
        yield StageTensor(f"{ours}.input_layernorm.weight", (f"{theirs}.input_layernorm.weight",), _one, _same, None)
        if layer in shape.softmax_layers:
            yield from _softmax_attention(shape, ours, theirs, tensor_size)
        elif shape.linear_attention is not None:
            yield from _linear_attention(shape.linear_attention, f"{ours}.self_attention", f"{theirs}.linear_attn")
        yield StageTensor(
            f"{ours}.pre_mlp_layernorm.weight", (f"{theirs}.post_attention_layernorm.weight",), _one, _same, None
        )
        sources = (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight")
        yield from _adapter(shape, ours, "mlp.linear_fc1", sources, (torch.cat, _halves), 2)
        yield StageTensor(
            f"{ours}.mlp.linear_fc1.weight",
            sources,
            torch.cat,
            _halves,
            0,
            2,
            torch.cat,
        )
        yield from _adapter(shape, ours, "mlp.linear_fc2", (f"{theirs}.mlp.down_proj.weight",))
        yield StageTensor(f"{ours}.mlp.linear_fc2.weight", (f"{theirs}.mlp.down_proj.weight",), _one, _same, 1, 1, _one)
    if last:
        yield StageTensor("language.decoder.final_layernorm.weight", ("model.norm.weight",), _one, _same, None)
        if not shape.tie_word_embeddings:
            yield StageTensor("language.output_layer.weight", ("lm_head.weight",), *vocabulary)
        elif not first:
            yield StageTensor("language.output_layer.weight", ("model.embed_tokens.weight",), *vocabulary)


def stage_tables(shape: ModelShape, tensor_size: int, pipeline_size: int) -> list[list[StageTensor]]:
    """Return the parameters of every pipeline stage, in the order of the stages."""
    names, tables = list(visual_shapes(shape)), []
    for stage in range(pipeline_size):
        layout = RankLayout(stage, pipeline_size, 1, pipeline_size)
        layers = layout.stage_layers(shape.num_layers)
        tables.append(
            list(stage_tensors(shape, layers, layout.is_first_stage, layout.is_last_stage, tensor_size, names))
        )
    return tables
