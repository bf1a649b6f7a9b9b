"""Whether the Triton kernels compute on this device what PyTorch computes, found out before they are trusted."""

from typing import Optional

import torch

from megatron_ral.attention import rows as attention_rows
from megatron_ral.attention.rows import RowKeys, RowQK

_BOUNDS = {torch.bfloat16: 2**-6, torch.float16: 2**-8, torch.float32: 1e-4}
"""Largest difference of a tensor relative to its largest element; several times what rounding makes."""


def _case(device: torch.device, dtype: torch.dtype, width: int) -> tuple[RowQK, RowKeys, torch.Tensor]:
    """One padded prompt with two responses of more than one tile, four heads to a key."""
    P, G, R, generator = 70, 2, 66, torch.Generator().manual_seed(0)

    def vectors(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, width, generator=generator).to(device, dtype).requires_grad_()

    qk = RowQK(
        vectors(1, G, R, 4),
        vectors(1, P, 1),
        vectors(1, G, R, 1),
        torch.tensor([P - 3], device=device),
        0,
        width**-0.5,
        4,
    )
    keys = RowKeys(torch.ones(1, P + R, dtype=torch.bool, device=device), P + torch.arange(R, device=device)[None])
    other = qk._replace(query_BGRnD=qk.query_BGRnD.flip(-1))
    return qk, keys, attention_rows.attention_distribution(attention_rows.head_mean_attention(other, False), keys)[0]


def kernel_fault(device: torch.device, dtype: torch.dtype, width: int) -> Optional[str]:
    """What the kernels do wrong on a small case; None: nothing.

    Rows, divergences and gradients of both paths are compared. The kernels are compiled here, which takes seconds where
    they are not in Triton's cache.
    """
    names, found = ("rows", "divergence", "gradient of queries", "of prompt keys", "of response keys"), []
    try:
        with torch.enable_grad():
            qk, keys, target = _case(device, dtype, width)
            for kernels in (True, False):
                rows = attention_rows.head_mean_attention(qk, kernels)
                value = attention_rows.row_divergence(qk, rows, target, keys, "jsd", kernels)
                weights = torch.linspace(-1.0, 1.0, value.numel(), device=device).view_as(value)
                found.append((rows, value.detach(), *torch.autograd.grad((value * weights).sum(), qk[:3])))
    except Exception as error:  # whatever a compiler or a driver raises
        return f"they fail with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for name, ours, wanted in zip(names, *found):
        difference = float((ours.float() - wanted.float()).abs().max() / wanted.float().abs().max())
        if not difference <= _BOUNDS[dtype]:
            return f"{name} differ from PyTorch's by {difference:.1e} of their largest element"
    return None
