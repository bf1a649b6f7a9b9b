"""References of the tests of token distillation.

One is the definition over the whole vocabulary in float64 with gradients by autograd. The other calls the functions
under test on a vocabulary split by hand.
"""

import pytest
import torch

from megatron_ral.functional.distillation_loss import (
    TokenDivergence,
    divergence_gradient,
    divergence_partials,
    local_statistics,
    merge_statistics,
    wide,
)
from megatron_ral.functional.distillation_top_tokens import (
    TopTokens,
    outcome_divergence,
    outcome_gradient,
    outcome_logprobs,
    outcome_partials,
    top_candidates,
)

ROWS, V = 6, 13
KINDS = [
    TokenDivergence("forward_kl"),
    TokenDivergence("reverse_kl"),
    TokenDivergence("jsd"),
    TokenDivergence("jsd", beta=0.2),
    TokenDivergence("jsd", beta=0.9, temperature=0.7),
    TokenDivergence("forward_kl", temperature=2.5),
    TokenDivergence("reverse_kl", temperature=0.6),
]
NAMES = [f"{kind.kind}-{kind.beta}-{kind.temperature}" for kind in KINDS]
every_kind = pytest.mark.parametrize("divergence", KINDS, ids=NAMES)


def rand(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


STUDENT, TEACHER, GRAD = 2 * rand(ROWS, V, seed=1), 2 * rand(ROWS, V, seed=2), rand(ROWS, seed=3)


def by_definition(student, teacher, divergence):
    """Return the divergence in float64, term by term; carries gradient to both."""
    log_q, log_p = (torch.log_softmax(logits.double() / divergence.temperature, -1) for logits in (student, teacher))
    return of_logprobs(log_q, log_p, divergence)


def of_logprobs(log_q, log_p, divergence):
    def kl(log_a, log_b):
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    if divergence.kind == "jsd":
        beta = divergence.beta
        log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    return kl(log_p, log_q) if divergence.kind == "forward_kl" else kl(log_q, log_p)


def with_gradient(function, student, teacher, divergence, grad):
    student = student.clone().requires_grad_()
    value = function(student, teacher, divergence)
    return value.detach(), torch.autograd.grad(value, student, grad)[0]


def by_shards(student, teacher, divergence, grad, shards=1):
    """Return value and gradient from `shards` shards of the vocabulary, not all equally wide."""
    dtype, temperature = wide(student, teacher), divergence.temperature
    pieces = list(zip(student.tensor_split(shards, -1), teacher.tensor_split(shards, -1)))
    rows = [
        merge_statistics([local_statistics(piece[index], temperature, dtype) for piece in pieces], temperature)
        for index in (0, 1)
    ]
    value, mean = sum(divergence_partials(*piece, *rows, divergence) for piece in pieces)
    return value, torch.cat(
        [divergence_gradient(*piece, *rows, mean, grad.to(dtype), divergence) for piece in pieces], -1
    )


def starts(pieces):
    return [sum(piece.shape[-1] for piece in pieces[:index]) for index in range(len(pieces))]


def outcomes_by_shards(logits, indices, temperature, shards):
    pieces = logits.tensor_split(shards, -1)
    partials = [
        outcome_partials(piece, indices, start, temperature, wide(logits))
        for piece, start in zip(pieces, starts(pieces))
    ]
    others = merge_statistics([partial.others for partial in partials], temperature)
    return others, outcome_logprobs(others, sum(partial.logits for partial in partials), temperature)


def top_tokens(logits, k, temperature, shards=1):
    pieces = logits.tensor_split(shards, -1)
    found = [top_candidates(piece, k, start) for piece, start in zip(pieces, starts(pieces))]
    values, ids = (torch.cat(parts, -1) for parts in zip(*found))
    indices = ids.gather(-1, values.topk(k, -1).indices)
    outcomes = outcomes_by_shards(logits, indices, temperature, shards)[1]
    return TopTokens(indices, outcomes[:, :-1], outcomes[:, -1])


def by_top_tokens(student, teacher, divergence, grad, shards=1):
    """Return value and gradient; `teacher` holds top tokens."""
    others, outcomes = outcomes_by_shards(student, teacher.indices, divergence.temperature, shards)
    value, gradient = outcome_divergence(outcomes, teacher.outcomes(outcomes.dtype), divergence)
    gradient, pieces = gradient * grad[:, None], student.tensor_split(shards, -1)
    return value, torch.cat(
        [
            outcome_gradient(piece, teacher.indices, start, others, gradient, divergence.temperature)
            for piece, start in zip(pieces, starts(pieces))
        ],
        -1,
    )
