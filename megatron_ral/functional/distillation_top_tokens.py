"""Divergence of a student from the k most likely tokens of a teacher, from vocabulary shards of the student.

The vocabulary is cut into k + 1 outcomes, the same for both models: each of the teacher's k tokens, and all others
together. Both stay distributions, so the divergence is never negative, 0 only where they agree on all outcomes, and at
most that over the whole vocabulary, which k = V gives. Of the teacher only k + 1 numbers per row have to travel.

    student's shard: `outcome_partials` -> gather, sum -> `merge_statistics`, `outcome_logprobs` -> [rows, k + 1]
    `outcome_divergence` (all of it on every rank) -> value, gradient per outcome -> `outcome_gradient` (this shard)

The mass of the others is summed, not taken as 1 minus the rest, which would be noise below 1e-7 in float32.

Without the last outcome (verl's `forward_kl_topk`) nothing holds the student's mass on the k tokens in place, and a sum
that is renormalised over them cannot see it. With it: verl's `forward_kl_topk_tail` (verl-project/verl
01dcf9f0cad6bd9b158cb875ae9e5c256f45633d, verl/trainer/distillation/tail_kl.py, forward KL, 1 - sum, clamped from
below), TRL's `loss_add_tail` (huggingface/trl f2cd57710ae345ea6428ae95363267fcf38a3dc8,
trl/experimental/server_distillation/server_distillation_trainer.py:71-81, all three divergences, 1 - sum).
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from megatron_ral.functional.distillation_loss import RowStatistics, TokenDivergence, row_pieces


class TopTokens(NamedTuple):
    """The most likely tokens of a teacher; no gradient is taken to it."""

    indices: Tensor
    """[..., k] int64 ids in the whole vocabulary, all different, each below the (padded) size of the vocabulary."""
    logprobs: Tensor
    """[..., k] log-probabilities at the temperature of the divergence, over the whole vocabulary."""
    others: Optional[Tensor] = None
    """[...] log-probability of all other tokens together. None: what is left of 1, and at least the precision of the
    log-probabilities' dtype (1e-7 in float32), which is what such a difference can tell."""

    def outcomes(self, dtype: torch.dtype) -> Tensor:
        """[..., k + 1] log-probabilities, the others last; finite."""
        others = self.others
        if others is None:
            left = 1.0 - self.logprobs.double().exp().sum(dim=-1)
            others = left.clamp_(min=torch.finfo(self.logprobs.dtype).eps).log_()
        outcomes = torch.cat([self.logprobs.to(dtype), others.to(dtype)[..., None]], dim=-1)
        return outcomes.clamp_(min=torch.finfo(dtype).min)


class OutcomePartials(NamedTuple):
    """What one shard knows of the outcomes."""

    others: RowStatistics
    """[rows] each: the maximum over all columns; the sum of exponentials over those that are no top token."""
    logits: Tensor
    """[rows, k] logits of the top tokens, 0 on shards that do not hold them; the sum over shards completes them."""


@torch.no_grad()
def top_candidates(logits_v: Tensor, k: int, vocab_start: int) -> tuple[Tensor, Tensor]:
    """The min(k, v) largest logits of one shard: (values [rows, .] in the dtype of the logits, ids in the whole
    vocabulary). The k largest of all shards are among theirs."""
    found = [torch.topk(logits_v[piece], min(k, logits_v.shape[1]), dim=-1) for piece in row_pieces(*logits_v.shape)]
    values, indices = (torch.cat(parts) for parts in zip(*found))
    return values, indices + vocab_start


@torch.no_grad()
def outcome_partials(
    logits_v: Tensor, indices: Tensor, vocab_start: int, temperature: float, dtype: torch.dtype
) -> OutcomePartials:
    """Partials of one shard.

    Args:
        logits_v: [rows, v] finite logits of this shard, any floating dtype.
        indices: [rows, k] ids in the whole vocabulary, different in a row.
        vocab_start: id of the shard's first column.
        temperature: > 0.
        dtype: of the result and the arithmetic.
    """
    rows, columns = logits_v.shape
    maximum, others = (torch.empty(rows, dtype=dtype, device=logits_v.device) for _ in range(2))
    picked = torch.empty(indices.shape, dtype=dtype, device=logits_v.device)
    for piece in row_pieces(rows, columns):
        logits = logits_v[piece].to(dtype)
        inside, local = _local(indices[piece], vocab_start, columns)
        picked[piece] = logits.gather(-1, local).masked_fill_(~inside, 0.0)
        maximum[piece] = logits.max(dim=-1).values
        exponentials = (logits - maximum[piece, None]).div_(temperature).exp_()
        others[piece] = _without(exponentials, inside, local).sum(dim=-1)
    return OutcomePartials(RowStatistics(maximum, others), picked)


def outcome_logprobs(others: RowStatistics, logits: Tensor, temperature: float) -> Tensor:
    """[rows, k + 1] log-probabilities of the top tokens and, last, of all others together; finite.

    Args:
        others: of `outcome_partials`, merged over all shards.
        logits: [rows, k] of `outcome_partials`, summed over all shards.
    """
    shifted = (logits - others.maximum[:, None]) / temperature
    normaliser = (shifted.exp().sum(dim=-1) + others.sum_exp).log()
    rest = others.sum_exp.clamp(min=torch.finfo(logits.dtype).tiny).log()
    return torch.cat([shifted, rest[:, None]], dim=-1) - normaliser[:, None]


def outcome_divergence(student: Tensor, teacher: Tensor, divergence: TokenDivergence) -> tuple[Tensor, Tensor]:
    """Divergence over outcomes from complete log-probabilities of both.

    Args:
        student, teacher: [rows, k + 1] log-probabilities that sum to 1 over the outcomes.

    Returns:
        (value [rows] in nats, >= 0; gradient [rows, k + 1] with respect to the student's log-weight of each outcome).
        Both are exactly 0 where the arguments are equal. No autograd gradient.
    """
    log_ratio, p, q = teacher - student, teacher.exp(), student.exp()
    slopes = divergence.slopes(log_ratio, p, q)
    return divergence.terms(log_ratio, p, q).sum(dim=-1), slopes - q * slopes.sum(dim=-1, keepdim=True)


@torch.no_grad()
def outcome_gradient(
    logits_v: Tensor, indices: Tensor, vocab_start: int, others: RowStatistics, gradient: Tensor, temperature: float
) -> Tensor:
    """Gradient with respect to one shard of the logits, from that with respect to the log-weights of the outcomes.

        dD/dlogit_i = gradient_i / temperature                                     for a top token
                    = gradient_others * q_i / q_others / temperature               for any other

    Args:
        logits_v, indices, vocab_start, temperature: as `outcome_partials`.
        others: statistics merged over all shards.
        gradient: [rows, k + 1] of `outcome_divergence`, times the gradient of each row's divergence.

    Returns:
        [rows, v] in the dtype of `logits_v`.
    """
    result = torch.empty_like(logits_v)
    gradient = gradient / temperature
    share = gradient[:, -1] / others.sum_exp.clamp(min=torch.finfo(gradient.dtype).tiny)
    for piece in row_pieces(*logits_v.shape):
        inside, local = _local(indices[piece], vocab_start, logits_v.shape[1])
        columns = (logits_v[piece].to(gradient.dtype) - others.maximum[piece, None]).div_(temperature).exp_()
        columns = _without(columns, inside, local).mul_(share[piece, None])
        result[piece] = columns.scatter_add_(-1, local, gradient[piece, :-1].masked_fill(~inside, 0.0))
    return result


def _local(indices: Tensor, vocab_start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Which of the ids are this shard's, and their columns (any column for the others)."""
    local = indices - vocab_start
    return (local >= 0) & (local < columns), local.clamp(0, columns - 1)


def _without(columns: Tensor, inside: Tensor, local: Tensor) -> Tensor:
    """Set the top tokens of non-negative columns to 0, in place. A minimum, because an id of another shard stands at
    some column too and must leave it as it is, whatever the order."""
    bound = torch.zeros_like(local, dtype=columns.dtype).masked_fill_(~inside, float("inf"))
    return columns.scatter_reduce_(-1, local, bound, reduce="amin")
