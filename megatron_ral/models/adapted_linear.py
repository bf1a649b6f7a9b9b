"""megatron-core's linear layers with a low-rank adapter: y = W x + scale * B A x.

On cut matrices A and B are cut as the merged result implies:

- a column-parallel matrix (rows of W cut) has a whole A on every tensor rank and a cut B. A x is formed from this
  rank's tokens and gathered under sequence parallelism; otherwise its gradient is summed over tensor ranks. Both send
  `rank` numbers per token where the matrix itself sends its width;
- a row-parallel matrix (columns of W cut) has a cut A and a whole B. The adapter's part of the output is added before
  the sum over tensor ranks that the matrix needs in any case, so that nothing more is sent.

A factor that every rank holds gets a part of its gradient on each rank where `partial_over_tensor_ranks` says so, and
the engine forms the sum.
"""

from contextlib import contextmanager
from typing import Any, Iterator, Optional, cast

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_ral.models.adapters import FUSED, adapted_parts
from megatron_ral.models.gated_delta_net import GatedDeltaNet
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.rank_layout import RankLayout


class LowRankAdapter(torch.nn.Module):
    """Adapter of one matrix on one tensor rank, with uninitialised factors.

    Args:
        A_shape: [parts * rank, inputs of this rank].
        B_shape: [outputs of this rank, rank].
        part_of_row: [outputs of this rank] int64 number of the adapted part that an output belongs to, and -1 for
            outputs of parts that are not adapted. None: all outputs belong to one part.
        scale: Factor of B A.
        dtype: Type of the factors.
        device: Device of the factors.
    """

    enabled = True
    """False: the matrix works as if there were no adapter."""

    def __init__(
        self,
        A_shape: tuple[int, int],
        B_shape: tuple[int, int],
        part_of_row: Optional[Tensor],
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.A = torch.nn.Parameter(torch.empty(A_shape, dtype=dtype, device=device))
        self.B = torch.nn.Parameter(torch.empty(B_shape, dtype=dtype, device=device))
        self.scale = scale
        blocks = None
        if part_of_row is not None:
            parts = A_shape[0] // B_shape[1]
            blocks = (part_of_row[:, None] == torch.arange(parts)).to(dtype).to(device)
        self.blocks: Optional[Tensor]
        self.register_buffer("blocks", blocks, persistent=False)

    def inner(self, hidden: Tensor) -> Tensor:
        """Return A x, [S, B, parts * rank]."""
        return F.linear(hidden, self.A)

    def add_to(self, output: Tensor, inner: Tensor) -> Tensor:
        """Return [S, B, outputs], the output of the matrix with that of the adapter added."""
        B = self.B if self.blocks is None else (self.B[:, None] * self.blocks[:, :, None]).flatten(1)
        return torch.add(output, F.linear(inner, B), alpha=self.scale)


class _Adapted(torch.nn.Module):
    """Part of a linear layer that adds its adapter's output, if it has one, before anything is summed over ranks."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.adapter: Optional[LowRankAdapter] = None

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = cast(Any, super())._forward_impl(input, weight, *args, **kwargs)
        if self.adapter is None or not self.adapter.enabled:
            return output
        return self.adapter.add_to(output, self._shared_inner(self.adapter.inner(input)))

    def _shared_inner(self, inner: Tensor) -> Tensor:
        """Return A x as B has to read it."""
        return inner


class AdaptedColumnParallelLinear(_Adapted, ColumnParallelLinear):
    """Column-parallel matrix that may have an adapter."""

    def _shared_inner(self, inner: Tensor) -> Tensor:
        group = cast(Any, self.tp_group)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True, group=group)
        if self.config.tensor_model_parallel_size > 1:
            return copy_to_tensor_model_parallel_region(inner, group=group)
        return inner


class AdaptedRowParallelLinear(_Adapted, RowParallelLinear):
    """Row-parallel matrix that may have an adapter."""


def add_adapters(
    layer: torch.nn.Module, shape: ModelShape, layout: RankLayout, dtype: torch.dtype, device: torch.device
) -> None:
    """Give the matrices of a language layer the adapters that the shape asks for, but those of linear attention none.

    Args:
        layer: Layer whose matrices are of this module's classes.
        shape: Shape of the model, with adapters.
        layout: This rank's place.
        dtype: Type of the factors.
        device: Device of the factors.
    """
    assert shape.adapter is not None
    rank = shape.adapter.rank
    for fused in FUSED:
        parts = adapted_parts(shape.adapter, fused)
        is_linear_attention = fused.startswith("self_attention.") and isinstance(layer.self_attention, GatedDeltaNet)
        if not parts or is_linear_attention:
            continue
        linear = cast(Any, layer.get_submodule(fused))
        outputs, inputs = linear.weight.shape
        part_of_row = None if len(FUSED[fused]) == 1 else _part_of_row(shape, layout, fused, parts)
        adapter = LowRankAdapter(
            (len(parts) * rank, inputs), (outputs, rank), part_of_row, shape.adapter.scale, dtype, device
        )
        is_column, cut = isinstance(linear, ColumnParallelLinear), layout.tensor_size > 1
        cast(Any, adapter.A).partial_over_tensor_ranks = cut and is_column and linear.sequence_parallel
        cast(Any, adapter.B).partial_over_tensor_ranks = cut and not is_column
        linear.adapter = adapter


def _part_of_row(shape: ModelShape, layout: RankLayout, fused: str, parts: tuple[str, ...]) -> Tensor:
    """Return the number of the adapted part of each row of a fused matrix on this tensor rank, -1 for none."""
    numbers = torch.tensor([parts.index(part) if part in parts else -1 for part in FUSED[fused]])
    if fused == "mlp.linear_fc1":  # gate and up are cut over tensor ranks each by itself
        return numbers.repeat_interleave(shape.ffn_hidden_size // layout.tensor_size)
    heads = shape.num_attention_heads // shape.num_query_groups * (2 if shape.family.output_gate else 1)
    of_group = numbers.repeat_interleave(torch.tensor([heads, 1, 1]) * shape.kv_channels)
    return of_group.repeat(shape.num_query_groups).chunk(layout.tensor_size)[layout.tensor_rank]


@contextmanager
def adapters_off(module: torch.nn.Module) -> Iterator[None]:
    """Switch all adapters of a model off inside a `with` block, so that it computes as its base weights do."""
    adapters = [part for part in module.modules() if isinstance(part, LowRankAdapter)]
    before = [adapter.enabled for adapter in adapters]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter, enabled in zip(adapters, before):
            adapter.enabled = enabled
