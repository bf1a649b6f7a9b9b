"""Work of a GPU and its host beside arithmetic: kernels to start, and waits of the host for the device.

Counted on tensors of a CUDA device, real or fake (`compat/cuda_fakes.py`). Operations outside aten, such as Triton
kernels and collectives, are not counted here.
"""

import sys
from collections import Counter
from contextlib import contextmanager
from typing import Any, Iterator, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_NO_KERNEL = frozenset(
    [
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "detach",
        "detach_",
        "alias",
        "as_strided",
        "lift_fresh",
        "resize_",
        "set_",
        "_local_scalar_dense",
        "_unsafe_view",
        "view",
        "_reshape_alias",
        "record_stream",
    ]
)
"""Operators that make or change a tensor object without a kernel."""
_DYNAMIC = frozenset(["nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal", "is_nonzero"])
"""Operators whose result has a size, or a value on the host, that only the device knows."""
ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_flash_attention_forward",
    "_varlen_attn",
)
"""Forward operators of fused attention."""


def add(counts: Counter, name: str, weight: float) -> None:
    """Add a call that counts as `weight` calls, which need not be whole."""
    counts[name] = counts[name] + weight  # pyright: ignore[reportArgumentType]


def on_device(tensors: Sequence[Tensor]) -> bool:
    """Say whether any of the tensors lies on a CUDA device."""
    return any(tensor.device.type == "cuda" for tensor in tensors)


def starts_kernel(name: str, makes_or_changes: bool) -> bool:
    """Say whether an aten operator starts a kernel.

    Args:
        name: name of the operator without its overload.
        makes_or_changes: whether it makes a storage or changes one.
    """
    return makes_or_changes and name not in _NO_KERNEL


def wait_of(name: str, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Optional[str]:
    """Return what the host waits for in an operator on CUDA tensors: "value", "size" or "copy". None: it goes on."""
    if name == "_local_scalar_dense":
        return "value"
    if name in _DYNAMIC or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        return "size"
    if name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
        isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    ):
        return "size"
    if name in ("_to_copy", "copy_"):
        source = args[1] if name == "copy_" else args[0]
        target = args[0] if name == "copy_" else result
        waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))
        if source.device.type != target.device.type and waits:
            return "copy"
    return None


def place() -> str:
    """Return file and line of the innermost code outside torch that is running, and that of this project around it."""
    inner, frame = "", sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename.replace("\\", "/")
        if "/megatron_ral/" in name and "/planning/" not in name and not name.endswith("parallel/traffic.py"):
            return f"{inner}{name.rpartition('/megatron_ral/')[2]}:{frame.f_lineno}"
        if not inner and "/site-packages/" in name and "/site-packages/torch/" not in name:
            inner = f"{name.rpartition('/site-packages/')[2]}:{frame.f_lineno} < "
        frame = frame.f_back
    return inner.removesuffix(" < ") or "torch"


def attention_call(name: str, args: Sequence[Any]) -> tuple[str, int]:
    """Return a description of a call of fused attention, and the bytes of its mask.

    The description has the name, the shapes of queries and keys, and the shape of the mask if there is one.
    """
    query, key = args[:2]
    text, size = f"{name.strip('_')} {tuple(query.shape)} x {tuple(key.shape)}", 0
    for mask in args[3:4]:
        if isinstance(mask, Tensor) and mask.dim() == 4:
            text, size = f"{text}, mask {tuple(mask.shape)}", mask.untyped_storage().nbytes()
    return text, size


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value inside a `with` block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _FusedNorm(torch.autograd.Function):
    """RMS norm as the kernels of a GPU: one forward, two backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, torch.empty(rows.shape[:-1], dtype=torch.float32, device=rows.device))
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rows, weight, _ = ctx.saved_tensors
        return rows.clone(), weight.clone()


@contextmanager
def fused_kernels() -> Iterator[None]:
    """Make attention and RMS norms of CUDA tensors the kernels that a GPU would take.

    A CPU build of torch has no kernels for CUDA tensors and falls back to plain products. cuDNN is switched off
    (`parallel/process_groups.py`), so that flash attention is taken without a mask and the memory-efficient kernel with
    one. Both need 16 bits. The functions themselves are replaced, because a mode does not reach recomputation in
    autograd's thread.
    """
    plain_norm: Any = F.rms_norm

    def norm(rows: Tensor, shape: Any, weight: Optional[Tensor] = None, eps: Optional[float] = None) -> Tensor:
        if not rows.is_cuda or weight is None:
            return plain_norm(rows, shape, weight, eps)
        return _FusedNorm.apply(rows, weight)

    plain: Any = F.scaled_dot_product_attention

    def chosen(query: Tensor, key: Tensor, value: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        if not query.is_cuda or query.dtype == torch.float32:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        scale = kwargs.get("scale")
        if attn_mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
        bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
        bias = bias.expand(*query.shape[:3], key.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale
        )[0]

    with replaced(F, "scaled_dot_product_attention", chosen), replaced(F, "rms_norm", norm):
        yield


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a result of an operator."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
