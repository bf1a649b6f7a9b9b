"""Divergences between attention policies, in forms that stay right at the size of the signal (1e-9).

Each is a value and the slope dD/dp, both over the last dimension. All values are sums of terms that are never negative,
so that nothing cancels where p is close to q; a constant added to a slope does not matter, because a distribution can
only change in directions that sum to 0.
"""

from typing import Callable, NamedTuple

import torch
from torch import Tensor

_SERIES_BELOW = 0.15


class Divergence(NamedTuple):
    """One divergence D(p, q) of a policy p from a target q, in nats."""

    value: Callable[[Tensor, Tensor], Tensor]
    """(p, q) -> D summed over the last dimension; exactly 0 where p equals q bit for bit."""
    slope: Callable[[Tensor, Tensor], Tensor]
    """(p, q) -> dD/dp up to a constant per row, elementwise; 0 where p = 0, whose softmax passes no gradient on."""


def _phi(x: Tensor) -> Tensor:
    """1/2 [(1 + x) ln(1 + x) + (1 - x) ln(1 - x)] for |x| <= 1, never negative.

    The direct form cancels for small x; there the series x^2/2 + x^4/12 + x^6/30 + x^8/56 + x^10/90 is used,
    every term of which is >= 0 (relative error below 1e-9 at |x| = 0.15).
    """
    square = x * x
    series = square * (1 / 2 + square * (1 / 12 + square * (1 / 30 + square * (1 / 56 + square / 90))))
    direct = 0.5 * (torch.xlogy(1 + x, 1 + x) + torch.xlogy(1 - x, 1 - x))
    return torch.where(x.abs() < _SERIES_BELOW, series, direct)


def _contrast(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """s = p + q and x = (p - q) / s, 0 where s = 0."""
    total = p + q
    return total, torch.where(total > 0, (p - q) / torch.where(total > 0, total, 1.0), 0.0)


def _jsd_value(p: Tensor, q: Tensor) -> Tensor:
    total, x = _contrast(p, q)
    return 0.5 * (total * _phi(x)).sum(dim=-1)


def _jsd_slope(p: Tensor, q: Tensor) -> Tensor:
    _, x = _contrast(p, q)
    return torch.where(p > 0, 0.5 * torch.log1p(x.clamp(min=-1 + torch.finfo(x.dtype).eps)), 0.0)


def _excess(u: Tensor) -> Tensor:
    """u - ln(1 + u) for u >= -1, never negative; by its series for small u, where the direct form cancels."""
    series = torch.zeros_like(u)
    for power in range(9, 1, -1):
        series = series * -u + 1 / power
    return torch.where(u.abs() < 0.03, u * u * series, u - torch.log1p(u))


def _kl_value(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) = sum_i p_i [u_i - ln(1 + u_i)] with u = q / p - 1, because both sum to 1; the same written with the
    logarithms apart where q is far from p, so that nothing overflows or cancels. Entries with p = 0 count q, their limit;
    where q = 0 < p the logarithm is that of the smallest normal number, so that the value stays finite."""
    tiny, difference = torch.finfo(p.dtype).tiny, q - p
    near = difference.abs() < 0.5 * p
    common = p * _excess(torch.where(near, difference / torch.where(p > 0, p, 1.0), 0.0))
    apart = p * (torch.log(p.clamp(min=tiny)) - torch.log(q.clamp(min=tiny)) - 1) + q
    return torch.where(near, common, apart.clamp(min=0.0)).sum(dim=-1)


def _reverse_slope(p: Tensor, q: Tensor) -> Tensor:
    tiny = torch.finfo(p.dtype).tiny
    return torch.where(p > 0, torch.log(p.clamp(min=tiny)) - torch.log(q.clamp(min=tiny)), 0.0)


def _forward_slope(p: Tensor, q: Tensor) -> Tensor:
    # -q / p + 1: exactly 0 where p = q
    return torch.where(p > 0, (p - q) / p.clamp(min=torch.finfo(p.dtype).tiny), 0.0)


DIVERGENCES = {
    "jsd": Divergence(_jsd_value, _jsd_slope),
    "forward_kl": Divergence(lambda p, q: _kl_value(q, p), _forward_slope),
    "reverse_kl": Divergence(_kl_value, _reverse_slope),
}
"""`jsd`: 1/2 KL(p || m) + 1/2 KL(q || m) with m = (p + q) / 2, in [0, ln 2] (RAL paper eq. 3). `forward_kl`: KL(q || p),
the target's mass must be covered. `reverse_kl`: KL(p || q), mass where the target has none is punished."""
