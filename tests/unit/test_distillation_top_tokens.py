"""Distillation from a teacher's k most likely tokens and the mass of all others, on vocabulary shards made by hand.

Compared are the definition over k + 1 outcomes, the whole vocabulary as k = V, the public formulas, and rounding.
"""

import math

import pytest
import torch

from megatron_ral.functional import distillation_loss
from megatron_ral.functional.distillation_loss import TokenDivergence
from tests.unit.distillation_references import (
    GRAD,
    KINDS,
    ROWS,
    STUDENT,
    TEACHER,
    V,
    by_definition,
    by_shards,
    by_top_tokens,
    every_kind,
    of_logprobs,
    rand,
    top_tokens,
    with_gradient,
)


@every_kind
@pytest.mark.parametrize("k, shards", [(1, 2), (4, 1), (4, 3), (12, 4)])
def test_top_tokens_equal_the_definition_over_outcomes(divergence, k, shards):
    """Return the divergence over k + 1 outcomes by autograd: the chosen tokens, and the sum of the others."""
    teacher = top_tokens(TEACHER, k, divergence.temperature, shards)
    log_p = torch.log_softmax(TEACHER / divergence.temperature, -1)
    assert torch.equal(teacher.indices, log_p.topk(k, -1).indices)
    assert torch.allclose(teacher.logprobs, log_p.topk(k, -1).values, atol=1e-14)
    chosen = torch.zeros(ROWS, V, dtype=torch.bool).scatter(-1, teacher.indices, True)

    def outcomes(logits):
        logprobs = torch.log_softmax(logits / divergence.temperature, -1)
        others = logprobs.masked_fill(chosen, float("-inf")).logsumexp(-1, keepdim=True)
        return torch.cat([logprobs.gather(-1, teacher.indices), others], -1)

    wanted = with_gradient(
        lambda student, *_: of_logprobs(outcomes(student), outcomes(TEACHER), divergence), STUDENT, None, None, GRAD
    )
    without_mass = teacher._replace(others=None)
    for found in (
        by_top_tokens(STUDENT, teacher, divergence, GRAD, shards),
        by_top_tokens(STUDENT, without_mass, divergence, GRAD, 2),
    ):
        assert torch.allclose(found[0], wanted[0], rtol=1e-10, atol=0)
        assert torch.allclose(found[1], wanted[1], rtol=1e-9, atol=1e-13) and wanted[1].abs().max() > 1e-3
    assert (wanted[0] <= by_definition(STUDENT, TEACHER, divergence) + 1e-12).all()


@every_kind
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_all_tokens_are_the_whole_vocabulary(divergence, dtype, tolerance):
    student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
    wanted = by_shards(student, teacher, divergence, GRAD)
    complete = top_tokens(teacher, V, divergence.temperature, 3)
    found = by_top_tokens(student, complete, divergence, GRAD.to(dtype), 2)
    for ours, full in zip(found, wanted):
        assert torch.allclose(ours, full, rtol=tolerance, atol=tolerance)
    value, gradient = by_top_tokens(student, complete._replace(others=None), divergence, GRAD.to(dtype), 2)
    assert torch.allclose(value, wanted[0], rtol=1e-3, atol=2e-5) and torch.isfinite(gradient).all()


def test_small_mass_of_the_others_is_summed_not_subtracted():
    """The mass outside the top token is 1e-9 (teacher) and 1e-8 (student), where 1 - p is 0 in float32."""
    teacher, student = torch.zeros(1, 101), torch.zeros(1, 101)
    teacher[0, 7], student[0, 7] = math.log(100 / 1e-9), math.log(100 / 1e-8)
    chosen = top_tokens(teacher, 1, 1.0, 2)
    assert chosen.indices.tolist() == [[7]] and float(chosen.others) == pytest.approx(math.log(1e-9), rel=1e-6)
    for divergence in KINDS[:3]:
        value, gradient = by_top_tokens(student, chosen, divergence, torch.ones(1), 2)
        wanted, wanted_gradient = with_gradient(
            by_definition, student.double(), teacher, divergence, torch.ones(1, dtype=torch.float64)
        )
        assert float(value) == pytest.approx(float(wanted), rel=1e-2) and wanted > 1e-10
        assert torch.allclose(gradient.double(), wanted_gradient, rtol=1e-2, atol=0)


def test_bucket_of_verl_and_trl():
    """verl-project/verl 01dcf9f0cad6bd9b158cb875ae9e5c256f45633d, verl/trainer/distillation/tail_kl.py: KL over the
    teacher's tokens plus t_p (log t_p - log t_q) with t = 1 - mass; TRL's `_add_tail_bucket` appends the same outcome.
    Without it (`forward_kl_topk`) the sum can be negative."""
    k, divergence = 4, TokenDivergence("forward_kl")
    teacher = top_tokens(TEACHER, k, 1.0)

    def tokens(student):
        log_q = torch.log_softmax(student, -1).gather(-1, teacher.indices)
        return (teacher.logprobs.exp() * (teacher.logprobs - log_q)).sum(-1), 1 - log_q.exp().sum(-1)

    def verl(student, teacher, _):
        kept, rest = tokens(student)
        left = 1 - teacher.logprobs.exp().sum(-1)
        return kept + left * (left.log() - rest.log())

    for found, wanted in zip(
        by_top_tokens(STUDENT, teacher, divergence, GRAD, 3), with_gradient(verl, STUDENT, teacher, divergence, GRAD)
    ):
        assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-13)
    sharper = torch.full_like(TEACHER, -5.0).scatter(-1, teacher.indices, teacher.logprobs + 1)
    assert (tokens(sharper)[0] < 0).any() and (by_top_tokens(sharper, teacher, divergence, GRAD)[0] > 0).all()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_logits_give_exactly_zero(divergence, dtype):
    student = (3 * rand(ROWS, 500, seed=4)).to(dtype)
    for shards in (1, 3):
        teacher = top_tokens(student, 9, divergence.temperature, shards)
        value, gradient = by_top_tokens(student, teacher, divergence, GRAD.float(), shards)
        assert not value.any() and not gradient.any() and value.dtype == torch.float32 and gradient.dtype == dtype


@every_kind
def test_padded_columns_add_nothing(divergence):
    """Three columns of padding, split into 1, 3 and 8 shards; k is larger than the vocabulary without them."""
    wanted = by_shards(STUDENT, TEACHER, divergence, GRAD)
    student, teacher = (torch.nn.functional.pad(logits, (0, 3), value=-1e9) for logits in (STUDENT, TEACHER))
    for shards in (1, 3, 8):
        chosen = top_tokens(teacher, V + 2, divergence.temperature, shards)
        value, gradient = by_top_tokens(student, chosen, divergence, GRAD, shards)
        assert torch.allclose(value, wanted[0], rtol=1e-10) and not gradient[:, V:].any()
        assert torch.allclose(gradient[:, :V], wanted[1], rtol=1e-9, atol=1e-13)


def test_chunks_of_rows_change_nothing(monkeypatch):
    student, teacher, grad = (rand(*shape, seed=seed) for shape, seed in (((37, 50), 7), ((37, 50), 8), ((37,), 9)))
    found = []
    for chunks in (1, 5, 37):
        monkeypatch.setattr(distillation_loss, "_CHUNK_ELEMENTS", 1)
        monkeypatch.setattr(distillation_loss, "_NUM_CHUNKS", chunks)
        chosen = top_tokens(teacher, 5, 1.0, 2)
        found.append((*chosen, *by_top_tokens(student, chosen, KINDS[2], grad, 2)))
    for again in found[1:]:
        assert all(torch.allclose(ours, wanted, rtol=1e-13, atol=1e-15) for ours, wanted in zip(again, found[0]))
