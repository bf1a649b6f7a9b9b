"""Comparison of formulas over rows with PyTorch's on their device, before a run relies on them."""

from typing import Iterator, Optional

import torch
from torch import Tensor

from megatron_ral.attention.backend import Compared, RowFormulas
from megatron_ral.attention.divergence import DIVERGENCES
from megatron_ral.attention.torch_formulas import TorchFormulas
from megatron_ral.attention.types import RowKeys

_BOUND = 1e-4
"""Largest allowed difference of a tensor relative to its largest element, several times what rounding makes."""


def formulas_fault(formulas: RowFormulas, device: torch.device) -> Optional[str]:
    """Compare formulas with PyTorch's on two prompts with two responses. Kernels are compiled here.

    Returns:
        Description of what the formulas do wrong. None: nothing.
    """
    try:
        pairs = zip(_results(formulas, device), _results(TorchFormulas(), device))
        for (name, ours), (_, wanted) in pairs:
            difference = float((ours - wanted).abs().max() / wanted.abs().max())
            if not difference <= _BOUND:
                return f"differ from PyTorch in {name} by {difference:.1e} of the largest element"
    except Exception as error:  # a compiler or a driver may raise anything
        return f"fail with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _results(formulas: RowFormulas, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield the result of every formula by its name."""
    B, G, R, P, generator = 2, 2, 5, 1030, torch.Generator().manual_seed(0)
    attention, other = torch.rand(2, B, G, R, P + R, generator=generator).to(device)
    keys = RowKeys(
        torch.arange(P + R, device=device).expand(B, -1) != 3, P + torch.arange(R, device=device).expand(B, R)
    )
    yield "the mass of rows", formulas.key_mass(attention, keys)
    target, _ = formulas.distribution(other, keys)
    yield "distributions", target
    visual = (torch.arange(P, device=device) % 3 == 0).expand(B, P)
    yield "masses", formulas.masses(attention, keys, visual, visual & (torch.arange(P, device=device) < 99))
    for kind in DIVERGENCES:
        value, mass = formulas.divergence(attention, target, keys, kind)
        yield f"divergence {kind}", value
        rows = Compared(attention, mass, target, keys, kind)
        grad = torch.linspace(-1.0, 1.0, value.numel(), device=device).view_as(value)
        block = (slice(0, B), slice(0, G), slice(1, R))
        yield f"the slope of {kind}", formulas.slope(rows, grad, block)
