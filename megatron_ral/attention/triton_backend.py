# Triton has no types for the arguments of a kernel's launch:
# pyright: reportCallIssue=false
"""Launches of the Triton kernels: the backend of attention rows on CUDA.

`rows.choose_backend` imports this module only where the kernels can run.
"""

from contextlib import nullcontext
from typing import ContextManager, NamedTuple, Optional

import torch
import triton
from torch import Tensor

from megatron_ral.attention import blocks
from megatron_ral.attention.backend import Gradients, SlopeOf
from megatron_ral.attention.triton_kernels import (
    Tile,
    _head_mean,
    _key_gradient,
    _query_gradient,
    _row_statistics,
    tile_of,
)
from megatron_ral.attention.types import Block, RowQK

SLOPE_ELEMENTS = 1 << 27
"""Elements of the slope that are written down for the kernels at once (512 MB)."""


class TritonBackend:
    """Backend for CUDA tensors of bfloat16, float16 or float32 with heads of at most 128."""

    def head_mean_rows(self, qk: RowQK) -> Tensor:
        return head_mean_rows(qk)

    def add_gradients(self, qk: RowQK, slope_of: SlopeOf, gradients: Gradients) -> None:
        for block in blocks.row_blocks(qk.query_BGRnD.shape[:3], qk.num_keys, SLOPE_ELEMENTS):
            add_gradients(qk, slope_of(block), block, gradients)


class _Inputs(NamedTuple):
    """Tensors with contiguous vectors, and the numbers that all kernels take."""

    query: Tensor
    prompt: Tensor
    response: Tensor
    lengths: Tensor
    tile: Tile

    @classmethod
    def of(cls, qk: RowQK) -> "_Inputs":
        tensors = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in qk[:3]]
        return cls(*tensors, qk.prompt_lengths_B.contiguous(), tile_of(qk.query_BGRnD.dtype, qk.query_BGRnD.shape[4]))

    @property
    def sizes(self) -> tuple[int, ...]:
        """G, R, P, T, N and the number of query heads that share a key."""
        _, G, R, n, _ = self.query.shape
        return G, R, self.prompt.shape[1], self.response.shape[2], n, n // self.prompt.shape[2]

    @property
    def constants(self) -> dict:
        return {"D": self.query.shape[4], **self.tile._asdict()}

    def segments(self) -> list[tuple[bool, Tensor, tuple[int, int, int, int]]]:
        """Return (whether it is the prompt, keys, strides of b, g, s, k) of each part, without an empty response."""
        b, s, k = self.prompt.stride()[:3]
        both = [(True, self.prompt, (b, 0, s, k)), (False, self.response, self.response.stride()[:4])]
        return both if self.response.shape[2] else both[:1]


def _statistics(inputs: _Inputs, qk: RowQK, slope: Optional[Tensor], first_row: int) -> tuple[Tensor, Tensor]:
    """Return normaliser and inner product, both [B, G, n, R] float32. Without a slope the latter is not set."""
    B, G, R, n, _ = inputs.query.shape
    normaliser, inner = (torch.empty(B, G, n, R, dtype=torch.float32, device=inputs.query.device) for _ in range(2))
    grid = (triton.cdiv(R, inputs.tile.ROWS), n, B * G)
    _row_statistics[grid](
        *inputs[:4],
        normaliser if slope is None else slope,
        normaliser,
        inner,
        *inputs.query.stride()[:4],
        *inputs.prompt.stride()[:3],
        *inputs.response.stride()[:4],
        *inputs.sizes,
        first_row,
        qk.lag,
        qk.scale,
        SLOPE=slope is not None,
        **inputs.constants,
    )
    return normaliser, inner


def head_mean_rows(qk: RowQK) -> Tensor:
    """Return `rows.head_mean_attention` of bfloat16, float16 or float32 inputs, [B, G, R, S] float32."""
    inputs = _Inputs.of(qk)
    B, G, R, _, _ = inputs.query.shape
    result = torch.empty(B, G, R, qk.num_keys, dtype=torch.float32, device=inputs.query.device)
    if not result.numel():
        return result
    with device_of(result):
        normaliser, _ = _statistics(inputs, qk, None, 0)
        for is_prompt, keys, strides in inputs.segments():
            size = keys.shape[1 if is_prompt else 2]
            grid = (triton.cdiv(size, inputs.tile.KEYS), triton.cdiv(R, inputs.tile.ROWS), B * G)
            _head_mean[grid](
                inputs.query,
                keys,
                inputs.lengths,
                normaliser,
                result,
                *inputs.query.stride()[:4],
                *strides,
                *inputs.sizes,
                qk.lag,
                qk.scale,
                qk.num_heads,
                PROMPT=is_prompt,
                **inputs.constants,
            )
    return result


def add_gradients(qk: RowQK, slope: Tensor, block: Block, gradients: Gradients) -> None:
    """Add the gradients of one block: all rows of some responses, or some rows of one response.

    Args:
        qk: Rows of the whole batch.
        slope: dD/da of the block times the gradient that reaches its rows, over `num_heads`. [b, g, r, S] float32,
            contiguous.
        block: Slices of b, g and r.
        gradients: Gradients in the shapes of `qk`. Those of the query are set, those of the keys are added to.
    """
    b, g, r = block
    part = qk._replace(
        query_BGRnD=qk.query_BGRnD[b, g, r],
        prompt_key_BPkD=qk.prompt_key_BPkD[b],
        response_key_BGTkD=qk.response_key_BGTkD[b, g],
        prompt_lengths_B=qk.prompt_lengths_B[b],
    )
    inputs, to_query = _Inputs.of(part), gradients[0][b, g, r]
    B, G, R, n, _ = inputs.query.shape
    with device_of(slope):
        normaliser, inner = _statistics(inputs, qk, slope, r.start)
        _query_gradient[(triton.cdiv(R, inputs.tile.ROWS), n, B * G)](
            *inputs[:4],
            slope,
            normaliser,
            inner,
            to_query,
            *inputs.query.stride()[:4],
            *inputs.prompt.stride()[:3],
            *inputs.response.stride()[:4],
            *to_query.stride()[:4],
            *inputs.sizes,
            r.start,
            qk.lag,
            qk.scale,
            **inputs.constants,
        )
        for is_prompt, keys, strides in inputs.segments():
            result = gradients[1][b][:, None] if is_prompt else gradients[2][b, g]
            tiles = triton.cdiv(keys.shape[1 if is_prompt else 2], inputs.tile.KEYS)
            grid = (tiles, keys.shape[-2], B if is_prompt else B * G)
            _key_gradient[grid](
                inputs.query,
                keys,
                inputs.lengths,
                slope,
                normaliser,
                inner,
                result,
                *inputs.query.stride()[:4],
                *strides,
                *result.stride()[:4],
                *inputs.sizes,
                r.start,
                qk.lag,
                qk.scale,
                PROMPT=is_prompt,
                **inputs.constants,
            )


def device_of(tensor: Tensor) -> ContextManager:
    """Return a context in which kernels start on the tensor's device, which need not be the current one."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()
