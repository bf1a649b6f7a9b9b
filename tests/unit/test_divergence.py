"""Every divergence and its slope against the definition in float64, against hand numbers, and at the size of RAL's
signal (1e-9 nats), where the usual float32 forms are negative or wrong by more than the value."""

import math

import pytest
import torch

from megatron_ral.attention.divergence import DIVERGENCES
from tests.unit.slow_attention import KINDS, slow_divergence


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near_pair(size: float, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of 64 whose logits differ by `size`, rounded to float32."""
    start = 2 * logits(64)
    rows = torch.softmax(start, -1), torch.softmax(start + size * logits(64, seed=1), -1)
    return tuple(row.to(dtype) for row in rows)


def exact(p: torch.Tensor, q: torch.Tensor, kind: str) -> float:
    """Definition in float64 of the distributions that these float32 numbers are up to their sum."""
    p, q = p.double(), q.double()
    return float(slow_divergence(p / p.sum(), q / q.sum(), kind))


def test_the_named_divergences_are_these():
    assert set(DIVERGENCES) == {*KINDS, "cross_entropy"}


@pytest.mark.parametrize("kind", KINDS)
def test_value_equals_the_definition(kind):
    p, q = torch.softmax(logits(20, 9, seed=1), -1), torch.softmax(logits(20, 9, seed=2), -1)
    wanted = torch.stack([slow_divergence(a, b, kind) for a, b in zip(p, q)])
    assert torch.allclose(DIVERGENCES[kind].value(p, q), wanted, rtol=1e-12, atol=0) and (wanted > 1e-2).all()


@pytest.mark.parametrize("kind", KINDS)
def test_slope_equals_the_gradient_of_the_definition_up_to_a_constant(kind):
    p, q = torch.softmax(logits(20, 9, seed=1), -1).requires_grad_(), torch.softmax(logits(20, 9, seed=2), -1)
    (wanted,) = torch.autograd.grad(sum(slow_divergence(a, b, kind) for a, b in zip(p, q)), p)
    slope = DIVERGENCES[kind].slope(p.detach(), q)
    assert torch.allclose(slope - slope[:, :1], wanted - wanted[:, :1], rtol=1e-11, atol=1e-13)
    assert (slope - slope[:, :1]).abs().max() > 0.1


def test_values_by_hand():
    p, q = torch.tensor([1 / 2, 1 / 2], dtype=torch.float64), torch.tensor([1 / 4, 3 / 4], dtype=torch.float64)
    wanted = {
        "reverse_kl": math.log(4 / 3) / 2,
        "forward_kl": math.log(1 / 2) / 4 + 3 * math.log(3 / 2) / 4,
        "jsd": (math.log(4 / 3) + math.log(4 / 5)) / 4 + math.log(2 / 3) / 8 + 3 * math.log(6 / 5) / 8,
    }
    for kind, value in wanted.items():
        assert float(DIVERGENCES[kind].value(p, q)) == pytest.approx(value, rel=1e-14), kind


def test_divergence_of_disjoint_distributions():
    """ln 2 is the most that jsd can be; the KLs are infinite and held at the logarithm of the smallest number."""
    for dtype, rel in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        p, q = torch.tensor([1.0, 0.0], dtype=dtype), torch.tensor([0.0, 1.0], dtype=dtype)
        assert float(DIVERGENCES["jsd"].value(p, q)) == pytest.approx(math.log(2), rel=rel)
        for kind in ("forward_kl", "reverse_kl"):
            assert float(DIVERGENCES[kind].value(p, q)) == pytest.approx(-math.log(torch.finfo(dtype).tiny), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4])
def test_value_near_zero_is_right_in_float32(kind, size):
    p, q = near_pair(size)
    truth = exact(p, q, kind)
    assert truth < size * size, "the test must be at the size it names"
    assert float(DIVERGENCES[kind].value(p, q)) == pytest.approx(truth, rel=1e-2) and truth > 0


@pytest.mark.parametrize("kind", KINDS)
def test_value_is_right_in_float32_for_every_ratio_of_entries(kind):
    """Entries of p and q that are near, far, and so far that 1 + (q - p) / p has no digits left."""
    for ratio in (10.0 ** (-step / 4) for step in range(1, 60)):
        p, q = torch.tensor([0.7, 0.27, 0.03]), torch.tensor([0.7 * ratio, 0.97 - 0.7 * ratio, 0.03])
        assert float(DIVERGENCES[kind].value(p, q)) == pytest.approx(exact(p, q, kind), rel=2e-6), ratio


def test_common_float32_forms_fail_where_ours_are_right():
    """What the tests above would not notice if the signal were larger: the textbook form, at 1e-9 nats."""
    p, q = near_pair(1e-4)
    mean = (p + q) / 2
    textbook = {
        "jsd": (p * (p / mean).log() + q * (q / mean).log()).sum() / 2,
        "forward_kl": (q * (q / p).log()).sum(),
        "reverse_kl": (p * (p / q).log()).sum(),
    }
    for kind, value in textbook.items():
        assert abs(float(value) / exact(p, q, kind) - 1) > 0.1, kind


@pytest.mark.parametrize("kind", KINDS)
def test_value_is_never_negative(kind):
    start = logits(2000, 50)
    for size in (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-3, 1e-1, 3.0):
        p = torch.softmax(start, -1).float()
        q = torch.softmax(start + size * logits(2000, 50, seed=1), -1).float()
        value = DIVERGENCES[kind].value(p, q)
        assert (value >= 0).all() and (value.max() > 0) == (size > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rows_are_exactly_zero_with_slope_zero(kind):
    p = torch.softmax(5 * logits(50, 40), -1).float()
    p[:, 7] = 0.0
    assert not DIVERGENCES[kind].value(p, p.clone()).any() and not DIVERGENCES[kind].slope(p, p.clone()).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("small", [0.0, 1e-45, 1e-40, 1e-38, 1e-30])
def test_entries_without_mass_stay_finite(kind, small):
    """Entries of p and of q that are 0, or so small that a quotient by them overflows, in every combination."""
    p = torch.tensor([0.5, 0.5 - small, small, small, 0.0])
    q = torch.tensor([0.5, small, 0.5 - small, small, 0.0])
    value, slope = DIVERGENCES[kind].value(p, q), DIVERGENCES[kind].slope(p, q)
    assert torch.isfinite(value) and torch.isfinite(p * slope).all() and torch.isfinite(slope).all()
    if kind == "jsd":
        assert float(value) == pytest.approx(math.log(2) / 2, rel=1e-6)
    elif small >= 1e-30:
        assert float(value) == pytest.approx(exact(p, q, kind), rel=1e-5)
    assert not slope[p == 0].any()
