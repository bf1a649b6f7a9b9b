"""Comparison of a backend with PyTorch on its device, before a run relies on it."""

from typing import Optional

import torch

from megatron_ral.attention.backend import RowBackend
from megatron_ral.attention.distribution import attention_distribution
from megatron_ral.attention.row_divergence import RowDivergence
from megatron_ral.attention.torch_backend import TorchBackend
from megatron_ral.attention.types import RowKeys, RowQK

_BOUNDS = {torch.bfloat16: 2**-6, torch.float16: 2**-8, torch.float32: 1e-4}
"""Largest allowed difference of a tensor relative to its largest element, several times what rounding makes."""


def _small_case(device: torch.device, dtype: torch.dtype, width: int) -> tuple[RowQK, RowKeys, torch.Tensor]:
    """Return one padded prompt with two responses of more than one tile, four query heads to a key, and a target."""
    P, G, R, generator = 70, 2, 66, torch.Generator().manual_seed(0)

    def vectors(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, width, generator=generator).to(device, dtype).requires_grad_()

    lengths = torch.tensor([P - 3], device=device)
    qk = RowQK(vectors(1, G, R, 4), vectors(1, P, 1), vectors(1, G, R, 1), lengths, 0, width**-0.5, 4)
    columns = torch.ones(1, P + R, dtype=torch.bool, device=device)
    keys = RowKeys(columns, P + torch.arange(R, device=device)[None])
    with torch.no_grad():
        other = TorchBackend().head_mean_rows(qk._replace(query_BGRnD=qk.query_BGRnD.flip(-1)))
    return qk, keys, attention_distribution(other, keys)[0]


def backend_fault(backend: RowBackend, device: torch.device, dtype: torch.dtype, width: int) -> Optional[str]:
    """Compare rows, divergences and gradients of a backend with PyTorch's on a small case.

    Kernels are compiled here, which takes seconds where they are not in the compiler's cache.

    Returns:
        Description of what the backend does wrong. None: nothing.
    """
    names, found = ("rows", "divergence", "gradient of queries", "of prompt keys", "of response keys"), []
    try:
        with torch.enable_grad():
            qk, keys, target = _small_case(device, dtype, width)
            for candidate in (backend, TorchBackend()):
                with torch.no_grad():
                    rows = candidate.head_mean_rows(qk)
                value = RowDivergence.apply(*qk[:3], rows, target, keys, "jsd", qk, candidate)
                weights = torch.linspace(-1.0, 1.0, value.numel(), device=device).view_as(value)
                found.append((rows, value.detach(), *torch.autograd.grad((value * weights).sum(), qk[:3])))
    except Exception as error:  # a compiler or a driver may raise anything
        return f"they fail with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for name, ours, wanted in zip(names, *found):
        difference = float((ours.float() - wanted.float()).abs().max() / wanted.float().abs().max())
        if not difference <= _BOUNDS[dtype]:
            return f"{name} differ from PyTorch's by {difference:.1e} of their largest element"
    return None
