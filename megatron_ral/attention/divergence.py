"""Divergences between attention distributions, in forms that stay accurate at the size of the signal (1e-9 nats).

Each divergence has a value and a slope dD/dp, both over the last dimension. Every value is a sum of terms that are
never negative, so that nothing cancels where p is close to q. A slope is defined up to a constant per row, because a
distribution can only change in directions that sum to 0.
"""

from typing import Callable, NamedTuple

import torch
from torch import Tensor

_SERIES_BELOW = 0.15


class Divergence(NamedTuple):
    """Divergence D(p, q) of an attention distribution p from a target q, in nats."""

    value: Callable[[Tensor, Tensor], Tensor]
    """Function (p, q) -> D, summed over the last dimension. It is exactly 0 where p equals q bit for bit."""
    slope: Callable[[Tensor, Tensor], Tensor]
    """Function (p, q) -> dD/dp of each element, up to a constant per row. It is 0 where p = 0, because the softmax
    passes no gradient there."""


def _phi(x: Tensor) -> Tensor:
    """Return 1/2 [(1 + x) ln(1 + x) + (1 - x) ln(1 - x)] for |x| <= 1, never negative.

    The direct form cancels for small x. There the series x^2/2 + x^4/12 + x^6/30 + x^8/56 + x^10/90 is used, whose
    terms are all >= 0. Its relative error is below 1e-9 at |x| = 0.15.
    """
    square = x * x
    series = square * (1 / 2 + square * (1 / 12 + square * (1 / 30 + square * (1 / 56 + square / 90))))
    small = x.abs() < _SERIES_BELOW
    if small.device.type == "cpu" and bool(small.all()):  # elsewhere the host would have to wait for the answer
        return series
    return torch.where(small, series, 0.5 * (torch.xlogy(1 + x, 1 + x) + torch.xlogy(1 - x, 1 - x)))


def _contrast(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return (s, x) with s = p + q and x = (p - q) / s. x is 0 where s = 0."""
    total = p + q
    return total, torch.where(total > 0, (p - q) / torch.where(total > 0, total, 1.0), 0.0)


def _jsd_value(p: Tensor, q: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence, summed over the last dimension."""
    total, x = _contrast(p, q)
    return 0.5 * (total * _phi(x)).sum(dim=-1)


def _jsd_slope(p: Tensor, q: Tensor) -> Tensor:
    """Return 1/2 ln(p / m) with m = (p + q) / 2, which is 1/2 ln(1 + x)."""
    _, x = _contrast(p, q)
    return torch.where(p > 0, 0.5 * torch.log1p(x.clamp(min=-1 + torch.finfo(x.dtype).eps)), 0.0)


def _excess(u: Tensor) -> Tensor:
    """Return u - ln(1 + u) for u >= -1, never negative. The direct form cancels for small u, where a series is used."""
    series = torch.zeros_like(u)
    for power in range(9, 1, -1):
        series = series * -u + 1 / power
    return torch.where(u.abs() < 0.03, u * u * series, u - torch.log1p(u))


def _kl_value(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q), summed over the last dimension.

        KL(p || q) = sum_i p_i [u_i - ln(1 + u_i)],   u = q / p - 1

    The two sides are equal because p and q each sum to 1. Where q is far from p the logarithms of p and q are taken
    separately, so that nothing overflows or cancels. Entries with p = 0 contribute q, which is their limit. Where
    q = 0 < p the logarithm of the smallest normal number stands in for ln 0, so that the value stays finite.
    """
    tiny, difference = torch.finfo(p.dtype).tiny, q - p
    near = difference.abs() < 0.5 * p
    near_terms = p * _excess(torch.where(near, difference / torch.where(p > 0, p, 1.0), 0.0))
    far_terms = p * (torch.log(p.clamp(min=tiny)) - torch.log(q.clamp(min=tiny)) - 1) + q
    return torch.where(near, near_terms, far_terms.clamp(min=0.0)).sum(dim=-1)


def _reverse_slope(p: Tensor, q: Tensor) -> Tensor:
    """Return ln(p / q), the slope of KL(p || q) without its constant 1."""
    tiny = torch.finfo(p.dtype).tiny
    return torch.where(p > 0, torch.log(p.clamp(min=tiny)) - torch.log(q.clamp(min=tiny)), 0.0)


def _forward_slope(p: Tensor, q: Tensor) -> Tensor:
    """Return 1 - q / p, the slope of KL(q || p) with a constant added."""
    # The constant 1 is added to -q / p, so that the slope is exactly 0 where p = q.
    return torch.where(p > 0, (p - q) / p.clamp(min=torch.finfo(p.dtype).tiny), 0.0)


def _cross_entropy(p: Tensor, q: Tensor) -> Tensor:
    """Return -sum q ln p. Where p = 0 < q the logarithm of the smallest normal number stands in for ln 0."""
    return -(q * torch.log(p.clamp(min=torch.finfo(p.dtype).tiny))).sum(dim=-1)


def _cross_entropy_slope(p: Tensor, q: Tensor) -> Tensor:
    """Return -q / p, the slope of the cross-entropy."""
    return torch.where(p > 0, -q / p.clamp(min=torch.finfo(p.dtype).tiny), 0.0)


DIVERGENCES = {
    "jsd": Divergence(_jsd_value, _jsd_slope),
    "forward_kl": Divergence(lambda p, q: _kl_value(q, p), _forward_slope),
    "reverse_kl": Divergence(_kl_value, _reverse_slope),
    "cross_entropy": Divergence(_cross_entropy, _cross_entropy_slope),
}
"""Divergences by their name in settings.

- `jsd`: 1/2 KL(p || m) + 1/2 KL(q || m) with m = (p + q) / 2, in [0, ln 2].
- `forward_kl`: KL(q || p). It is large where the distribution does not cover the target's mass.
- `reverse_kl`: KL(p || q). It is large where the distribution has mass and the target has none.
- `cross_entropy`: KL(q || p) plus the target's entropy. It is not 0 where p equals q, and its gradient is that of
  `forward_kl`. Target `contrast` takes it, because with weights of both signs values of a kind have to cancel.

Source of `jsd`: RAL paper (arXiv 2602.04884) eq. (3).
"""
