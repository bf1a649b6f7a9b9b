"""Head-averaged attention of chosen rows, and the divergence of a row from a target with its gradient to q and k.

Fused attention kernels return no weights, and eager attention holds one map per head. Here rows are formed from
recorded queries and keys, block by block, and only their average over heads is stored. The gradient is a closed form
(`row_divergence.RowDivergence`) whose backward pass forms the weights again. On CUDA Triton kernels do both, elsewhere
PyTorch does; `choose_backend` decides.

Under tensor parallelism `head_mean_attention` gives the part of this rank's heads. The sum over ranks is the only
collective, and the backward pass needs none.
"""

import functools
import importlib.util
import logging
from typing import Optional

import torch
from torch import Tensor

from megatron_ral.attention.backend import RowBackend
from megatron_ral.attention.backend_check import backend_fault
from megatron_ral.attention.row_divergence import RowDivergence
from megatron_ral.attention.torch_backend import TorchBackend
from megatron_ral.attention.types import RowKeys, RowQK

logger = logging.getLogger(__name__)

_KERNEL_WIDTH = 128
"""Widest head of the Triton kernels, because their tiles are of full width."""


def _obstacle(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Return why the Triton kernels cannot form such rows. Empty: they can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if width > _KERNEL_WIDTH:
        return f"heads are {width} wide and the kernels take at most {_KERNEL_WIDTH}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernels do not take {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it comes with CUDA builds of torch)"
    return ""


@functools.cache
def choose_backend(device: torch.device, dtype: torch.dtype, width: int) -> tuple[RowBackend, str]:
    """Choose what forms rows of such tensors: the Triton kernels where they run and agree with PyTorch on this device.

    Logs one line each time the arguments are new, as a warning where a GPU has to do without the kernels.

    Args:
        device: Device of queries and keys.
        dtype: Their type.
        width: Head width D.

    Returns:
        (backend, description for the log).
    """
    obstacle = _obstacle(device, dtype, width)
    backend: RowBackend = TorchBackend()
    if not obstacle:
        from megatron_ral.attention.triton_backend import TritonBackend

        kernels = TritonBackend()
        fault = backend_fault(kernels, device, dtype, width)
        if fault:
            obstacle = f"the Triton kernels are at fault here: {fault}"
        else:
            backend = kernels
    description = f"PyTorch, because {obstacle}" if obstacle else "Triton kernels"
    level = logging.WARNING if device.type == "cuda" and obstacle else logging.INFO
    logger.log(level, "attention rows on %s: %s", device, description)
    return backend, description


def _backend_for(qk: RowQK, backend: Optional[RowBackend]) -> RowBackend:
    query = qk.query_BGRnD
    return choose_backend(query.device, query.dtype, query.shape[4])[0] if backend is None else backend


@torch.no_grad()
def head_mean_attention(qk: RowQK, backend: Optional[RowBackend] = None) -> Tensor:
    """Return the attention of every row, summed over this rank's heads and divided by the heads of all ranks.

        out[b, g, r, j] = 1 / num_heads * sum_h softmax_j(scale * q[b, g, r, h] . k[b, g, j, h])

    Args:
        qk: Rows and the keys they see.
        backend: What forms the rows. None: the choice of `choose_backend`.

    Returns:
        [B, G, R, S] float32 (float64 for float64 inputs) without gradient. The sum over tensor-parallel ranks has rows
        that sum to 1. Columns that a row cannot see are exactly 0.
    """
    return _backend_for(qk, backend).head_mean_rows(qk)


def row_divergence(
    qk: RowQK,
    attention_BGRS: Tensor,
    target_BGRS: Tensor,
    keys: RowKeys,
    kind: str = "jsd",
    backend: Optional[RowBackend] = None,
) -> Tensor:
    """Return the divergence of every row's attention distribution from its target.

    Args:
        qk: Rows. Gradient flows to their queries and keys.
        attention_BGRS: `head_mean_attention` of these rows, summed over tensor-parallel ranks.
        target_BGRS: Distributions over the same keys, e.g. `attention_distribution` of another pass. They are constant
            and may be expanded from fewer rows.
        keys: Keys that the distributions are made of.
        kind: Name of `divergence.DIVERGENCES`.
        backend: As for `head_mean_attention`.

    Returns:
        [B, G, R] in nats, >= 0. Rows without mass on their keys and rows without a target (all zeros) give 0 and no
        gradient.

    Source: RAL paper (arXiv 2602.04884) eq. (3).
    """
    target = target_BGRS.detach().expand(attention_BGRS.shape)
    return RowDivergence.apply(*qk[:3], attention_BGRS.detach(), target, keys, kind, qk, _backend_for(qk, backend))
