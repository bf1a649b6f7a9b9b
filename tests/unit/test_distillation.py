"""Token distillation on vocabulary shards: numbers by hand, the definition, TRL's formula, rounding.

Shards are made by hand and their sums added. The collectives are tested in
tests/distributed/test_distillation_vocab.py.
"""

import math

import pytest
import torch

from megatron_ral.functional import distillation_loss
from megatron_ral.functional.distillation_loss import TokenDivergence
from tests.unit.distillation_references import (
    GRAD,
    ROWS,
    STUDENT,
    TEACHER,
    V,
    by_definition,
    by_shards,
    every_kind,
    rand,
    with_gradient,
)

# --- by hand ----------------------------------------------------------------------------------------------------------


def test_two_tokens_by_hand():
    """The teacher is P = (1/2, 1/2), the student Q = (1/4, 3/4)."""
    ln, one = math.log, torch.ones(1, dtype=torch.float64)
    teacher, student = (torch.tensor([[0.0, logit]], dtype=torch.float64) for logit in (0.0, ln(3)))

    def found(*arguments, **settings):
        value, gradient = by_shards(student, teacher, TokenDivergence(*arguments, **settings), one)
        return float(value), gradient[0].tolist()

    assert found("forward_kl") == (pytest.approx(0.5 * ln(4 / 3), rel=1e-14), pytest.approx([-0.25, 0.25]))
    reverse = 0.75 * ln(3) - ln(2)
    assert found("reverse_kl") == (pytest.approx(reverse, rel=1e-14), pytest.approx([-3 / 16 * ln(3), 3 / 16 * ln(3)]))
    # M = (3/8, 5/8), and (5/16, 11/16) with a teacher that counts a quarter
    half = 0.5 * (0.5 * ln(4 / 3) + 0.5 * ln(4 / 5)) + 0.5 * (0.25 * ln(2 / 3) + 0.75 * ln(6 / 5))
    quarter = 0.25 * (0.5 * ln(8 / 5) + 0.5 * ln(8 / 11)) + 0.75 * (0.25 * ln(4 / 5) + 0.75 * ln(12 / 11))
    slope = 0.75 * 3 / 16 * (ln(4 / 5) - ln(12 / 11))
    assert found("jsd")[0] == pytest.approx(half, rel=1e-14)
    assert found("jsd", beta=0.25) == (pytest.approx(quarter, rel=1e-14), pytest.approx([slope, -slope]))
    assert abs(0.5 * ln(4 / 3) - reverse) > 0.01 and quarter < half


def test_settings_that_mean_nothing_are_refused():
    for settings, message in (
        ({"kind": "kl"}, "kl"),
        ({"beta": 0.0}, "beta = 0.0"),
        ({"beta": 1.0}, "forward_kl"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenDivergence(**settings)


# --- the definition over the whole vocabulary -------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("shards", [1, 2, 3, 4])
def test_shards_equal_the_definition(divergence, shards):
    value, gradient = by_shards(STUDENT, TEACHER, divergence, GRAD, shards)
    wanted, wanted_gradient = with_gradient(by_definition, STUDENT, TEACHER, divergence, GRAD)
    assert torch.allclose(value, wanted, rtol=1e-12, atol=0) and wanted.min() > 0.02
    assert torch.allclose(gradient, wanted_gradient, rtol=1e-11, atol=1e-15) and wanted_gradient.abs().max() > 0.02
    swapped = by_definition(TEACHER, STUDENT, divergence)
    symmetric = divergence.kind == "jsd" and divergence.beta == 0.5
    assert ((value - swapped).abs().max() < 1e-12) == symmetric, "the comparison must see a flipped direction"


class Cut(torch.autograd.Function):
    """Return value and gradient from three shards, with the local functions called as autograd would."""

    @staticmethod
    def forward(ctx, student, teacher, divergence):
        ctx.save_for_backward(student, teacher)
        ctx.divergence = divergence
        return by_shards(student, teacher, divergence, torch.zeros(len(student)), 3)[0]

    @staticmethod
    def backward(ctx, grad):
        return by_shards(*ctx.saved_tensors, ctx.divergence, grad, 3)[1], None, None


@every_kind
def test_gradcheck(divergence):
    assert torch.autograd.gradcheck(
        lambda student: Cut.apply(student, TEACHER, divergence), (STUDENT.clone().requires_grad_(),)
    )


@pytest.mark.parametrize("kind, share", [("forward_kl", lambda beta: beta), ("reverse_kl", lambda beta: 1 - beta)])
def test_jsd_near_the_ends_is_a_small_multiple_of_a_kl(kind, share):
    errors = []
    for small in (1e-2, 1e-4, 1e-6):
        beta = small if kind == "forward_kl" else 1 - small
        found = by_shards(STUDENT, TEACHER, TokenDivergence("jsd", beta=beta), GRAD)
        wanted = by_shards(STUDENT, TEACHER, TokenDivergence(kind), GRAD)
        errors.append(max(float((ours / share(beta) - kl).abs().max()) for ours, kl in zip(found, wanted)))
    assert errors[0] > 10 * errors[1] > 100 * errors[2] and errors[2] < 1e-3


def test_jsd_is_bounded_by_the_entropy_of_beta():
    apart = 60 * torch.eye(2, dtype=torch.float64)
    for beta in (0.1, 0.5, 0.7):
        value, gradient = by_shards(apart, apart.flip(0), TokenDivergence("jsd", beta=beta), torch.ones(2))
        entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert value.tolist() == pytest.approx([entropy] * 2, rel=1e-12) and torch.isfinite(gradient).all()


# --- public formulas --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_beta_of_trl(beta):
    """huggingface/trl f2cd57710ae345ea6428ae95363267fcf38a3dc8, trl/experimental/gkd/gkd_trainer.py:271-300, anew.

    `kl_div(input, target)` with log_target is target (log target - input), which is KL(target || input).
    """

    def trl(student, teacher, divergence):
        log_q, log_p = (torch.log_softmax(logits / divergence.temperature, -1) for logits in (student, teacher))
        pointwise = torch.nn.functional.kl_div
        if beta in (0.0, 1.0):
            first, second = (log_q, log_p) if beta == 0.0 else (log_p, log_q)
            return pointwise(first, second, reduction="none", log_target=True).sum(-1)
        mixture = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
        return (
            beta * pointwise(mixture, log_p, reduction="none", log_target=True)
            + (1 - beta) * pointwise(mixture, log_q, reduction="none", log_target=True)
        ).sum(-1)

    settings = {0.0: {"kind": "forward_kl"}, 1.0: {"kind": "reverse_kl"}}.get(beta, {"kind": "jsd", "beta": beta})
    ours = TokenDivergence(**settings, temperature=0.9)
    for found, wanted in zip(
        by_shards(STUDENT, TEACHER, ours, GRAD, 2), with_gradient(trl, STUDENT, TEACHER, ours, GRAD)
    ):
        assert torch.allclose(found, wanted, rtol=1e-11, atol=1e-14)


# --- rounding ---------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_equal_logits_give_exactly_zero(divergence, dtype, shards):
    student = (3 * rand(ROWS, 500, seed=4)).to(dtype)
    for teacher in (student.clone(), student.float()):
        value, gradient = by_shards(student, teacher, divergence, GRAD, shards)
        assert not value.any() and not gradient.any() and value.dtype == torch.float32 and gradient.dtype == dtype


@every_kind
@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_close_logits_in_float32(divergence, size):
    """The value is of order size^2, 1e-9 here, and a sum of p (log p - log q) in float32 is wrong by a factor of 50."""
    teacher = 4 * rand(ROWS, 3000, seed=5, dtype=torch.float32) + 20
    student = teacher + size * rand(ROWS, 3000, seed=6, dtype=torch.float32)
    value, gradient = by_shards(student, teacher, divergence, torch.ones(ROWS), 2)
    ones = torch.ones(ROWS, dtype=torch.float64)
    wanted, wanted_gradient = with_gradient(by_definition, student.double(), teacher, divergence, ones)
    assert (value > 0).all() and (value / wanted - 1).abs().max() < 1e-3 and wanted.max() < 3 * size**2
    assert (gradient - wanted_gradient).norm() < 1e-5 * wanted_gradient.norm()
    assert gradient.sum(-1).abs().max() < 1e-5 * gradient.abs().sum(-1).min()


@every_kind
def test_bfloat16_logits_are_computed_in_float32(divergence):
    student, teacher = STUDENT.bfloat16(), TEACHER.bfloat16()
    value, gradient = by_shards(student, teacher, divergence, GRAD, 2)
    wanted, wanted_gradient = with_gradient(by_definition, student.double(), teacher, divergence, GRAD)
    assert torch.allclose(value.double(), wanted, rtol=1e-5) and value.dtype == torch.float32
    assert torch.allclose(gradient.double(), wanted_gradient, rtol=2**-8, atol=1e-6)
    assert gradient.dtype == torch.bfloat16


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_padded_columns_add_nothing(divergence, dtype):
    """Three columns of padding: with 3 and 8 shards whole shards are padding. bfloat16 rounds -1e9."""
    student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
    wanted = by_shards(student, teacher, divergence, GRAD, 1)
    padded = [torch.cat([logits, torch.full((ROWS, 3), -1e9, dtype=dtype)], -1) for logits in (student, teacher)]
    mixed = [padded[0], torch.cat([teacher.to(torch.float64), torch.full((ROWS, 3), -1e9, dtype=torch.float64)], -1)]
    for pair in (padded, mixed):
        for shards in (1, 3, 8):
            value, gradient = by_shards(*pair, divergence, GRAD, shards)
            assert torch.allclose(value.to(wanted[0].dtype), wanted[0], rtol=2e-6) and not gradient[:, V:].any()
            assert torch.allclose(gradient[:, :V].float(), wanted[1].float(), rtol=1e-2, atol=1e-6)


@every_kind
def test_far_logits_stay_finite(divergence):
    student = torch.tensor([[300.0, -300.0, 0.0], [-2e4, 2e4, 0.0], [0.0, 0.0, 0.0]])
    value, gradient = by_shards(student, student.flip(0), divergence, torch.ones(3))
    ones = torch.ones(3, dtype=torch.float64)
    wanted, wanted_gradient = with_gradient(by_definition, student.double(), student.flip(0), divergence, ones)
    if divergence.kind != "jsd":  # the reference has 0 log 0 there
        assert torch.allclose(value.double(), wanted, rtol=1e-5)
        assert (gradient - wanted_gradient).abs().max() <= 1e-5 * wanted_gradient.abs().max()
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all() and (value >= 0).all()


@every_kind
def test_chunks_of_rows_change_nothing(divergence, monkeypatch):
    student, teacher, grad = (
        rand(*shape, seed=seed, dtype=torch.float32) for shape, seed in (((37, 50), 7), ((37, 50), 8), ((37,), 9))
    )
    whole = by_shards(student, teacher, divergence, grad, 2)
    monkeypatch.setattr(distillation_loss, "_CHUNK_ELEMENTS", 1)
    for chunks in (37, 5):
        monkeypatch.setattr(distillation_loss, "_NUM_CHUNKS", chunks)
        assert len(list(distillation_loss.row_chunks(37, 25))) in (37, 6, 5)
        again = by_shards(student, teacher, divergence, grad, 2)
        for ours, wanted in zip(again, whole):
            assert torch.allclose(ours, wanted, rtol=1e-6, atol=1e-8)
