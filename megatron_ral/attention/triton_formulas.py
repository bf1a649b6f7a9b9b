# Triton has no types for the arguments of a kernel's launch:
# pyright: reportCallIssue=false
"""Launches of the Triton kernels of formulas over rows. `formulas.choose_formulas` imports this module on CUDA only."""

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from megatron_ral.attention import triton_backend
from megatron_ral.attention.backend import Compared
from megatron_ral.attention.triton_formula_kernels import (
    _distribution_of_rows,
    _divergence_of_rows,
    _mass_of_rows,
    _masses_of_rows,
    _slope_of_rows,
)
from megatron_ral.attention.types import ALL_ROWS, Block, RowKeys

_BLOCK = 1024
"""Elements of a row that a program holds at once. All kernels take the same, so that sums round alike."""


class TritonFormulas:
    """Formulas over float32 rows on CUDA: one or two launches each."""

    def key_mass(self, attention_BGRS: Tensor, keys: RowKeys) -> Tensor:
        return _mass(_Rows.of(attention_BGRS, keys))

    def distribution(self, attention_BGRS: Tensor, keys: RowKeys) -> tuple[Tensor, Tensor]:
        rows = _Rows.of(attention_BGRS, keys)
        mass, result = _mass(rows), rows.attention.new_empty(rows.attention.shape)
        _launch(_distribution_of_rows, rows, mass, result, *rows.strides, *rows.sizes)
        return result, mass

    def divergence(
        self, attention_BGRS: Tensor, target_BGRS: Tensor, keys: RowKeys, kind: str
    ) -> tuple[Tensor, Tensor]:
        rows, target = _Rows.of(attention_BGRS, keys), _contiguous_rows(target_BGRS)
        mass, result = _mass(rows), rows.numbers()
        steps = (*rows.strides, *target.stride()[:3], *rows.sizes)
        _launch(_divergence_of_rows, rows, mass, target, result, *steps, KIND=kind)
        return result, mass

    def slope(self, rows: Compared, grad_BGR: Tensor, block: Block) -> Tensor:
        part = _Rows.of(rows.attention_BGRS, rows.keys, block)
        target, mass = _contiguous_rows(rows.target_BGRS)[block], rows.mass_BGR[block]
        result = mass.new_empty(*mass.shape, part.attention.shape[3])
        steps = (*part.strides, *target.stride()[:3], *mass.stride(), *part.sizes)
        grad = grad_BGR.contiguous()[block]  # has the strides of the mass
        _launch(_slope_of_rows, part, mass, target, grad, result, *steps, KIND=rows.kind)
        return result

    def masses(self, attention_BGRS: Tensor, keys: RowKeys, visual_mask_BP: Tensor, target_mask_BP: Tensor) -> Tensor:
        rows = _Rows.of(attention_BGRS, keys)
        visual, target = (_bytes(mask) for mask in (visual_mask_BP, target_mask_BP))
        mass, result = _mass(rows), rows.numbers(6)
        steps = (*rows.strides, visual.stride(0), target.stride(0), *rows.sizes, visual.shape[1], rows.count)
        _launch(_masses_of_rows, rows, mass, visual, target, result, *steps)
        return result


class _Rows(NamedTuple):
    """Rows of a block, and what all kernels take of them."""

    attention: Tensor
    """[b, g, r, S], contiguous in S."""
    columns: Tensor
    """[b, S] bytes, contiguous in S."""
    own: Optional[Tensor]
    """[b, r] int64."""

    @classmethod
    def of(cls, attention_BGRS: Tensor, keys: RowKeys, block: Block = ALL_ROWS) -> "_Rows":
        b, _, r = block
        attention, columns = _contiguous_rows(attention_BGRS.detach()), _bytes(keys.columns_BS)
        return cls(attention[block], columns[b], None if keys.own_BR is None else keys.own_BR[b, r])

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Attention, columns, and own columns (without these, something that is not read)."""
        return self.attention, self.columns, self.columns if self.own is None else self.own

    @property
    def strides(self) -> tuple[int, ...]:
        own = (0, 0) if self.own is None else self.own.stride()
        return *self.attention.stride()[:3], self.columns.stride(0), *own

    @property
    def sizes(self) -> tuple[int, int, int]:
        """G, R, S."""
        _, G, R, S = self.attention.shape
        return G, R, S

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.attention.shape[:3].numel()

    def numbers(self, *count: int) -> Tensor:
        """Return a new tensor with a number for each row, [*count, b, g, r]."""
        return self.attention.new_empty(*count, *self.attention.shape[:3])


def _mass(rows: _Rows) -> Tensor:
    mass = rows.numbers()
    _launch(_mass_of_rows, rows, mass, *rows.strides, *rows.sizes)
    return mass


def _contiguous_rows(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _bytes(mask: Tensor) -> Tensor:
    return (mask if mask.stride(-1) == 1 else mask.contiguous()).view(torch.uint8)


def _launch(kernel: Any, rows: _Rows, *arguments: Any, **flags: Any) -> None:
    """Start a program for every row, on the device of the rows, which need not be the current one."""
    if rows.count:
        with triton_backend.device_of(rows.attention):
            kernel[(rows.count,)](*rows.tensors, *arguments, OWN=rows.own is not None, BLOCK=_BLOCK, **flags)
