"""Divergence between a student and the k most likely tokens of a teacher, from vocabulary shards of the student.

The vocabulary is grouped into k + 1 outcomes, the same for both models: each of the teacher's k tokens, and all other
tokens together. Both models are distributions over the outcomes. The divergence is therefore never negative, 0 only
where both agree on all outcomes, and at most the divergence over the whole vocabulary, which k = V gives. Only k + 1
numbers per row of the teacher are sent.

    student's shard: `outcome_partials` -> gather, sum -> `merge_statistics`, `outcome_logprobs` -> [rows, k + 1]
    `outcome_divergence` (the same on every rank) -> value, gradient per outcome -> `outcome_gradient` (this shard)

The mass of the other tokens is a sum, not 1 minus the mass of the k tokens, which would be noise below 1e-7 in float32.

Without the last outcome (verl's `forward_kl_topk`) nothing bounds the student's total mass on the k tokens, and a
distribution renormalised over them does not show it. Losses with the last outcome: verl's `forward_kl_topk_tail`
(verl-project/verl 01dcf9f0cad6bd9b158cb875ae9e5c256f45633d, verl/trainer/distillation/tail_kl.py, forward KL, 1 - sum,
clamped from below), TRL's `loss_add_tail` (huggingface/trl f2cd57710ae345ea6428ae95363267fcf38a3dc8,
trl/experimental/server_distillation/server_distillation_trainer.py:71-81, all three divergences, 1 - sum).
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from megatron_ral.functional.distillation_loss import RowStatistics, TokenDivergence, row_chunks


class TopTokens(NamedTuple):
    """Most likely tokens of a teacher, without gradient."""

    indices: Tensor
    """Token ids in the whole vocabulary, [..., k] int64, all different, each below the (padded) vocabulary size."""
    logprobs: Tensor
    """Log-probabilities over the whole vocabulary at the temperature of the divergence, [..., k]."""
    others: Optional[Tensor] = None
    """Log-probability of all other tokens together, [...]. None for 1 minus the mass of the k tokens, at least the
    precision of the log-probabilities' dtype (1e-7 in float32), because a smaller difference is noise."""

    def outcomes(self, dtype: torch.dtype) -> Tensor:
        """Return the log-probabilities of the k + 1 outcomes, [..., k + 1], the other tokens last; all finite."""
        others = self.others
        if others is None:
            left = 1.0 - self.logprobs.double().exp().sum(dim=-1)
            others = left.clamp_(min=torch.finfo(self.logprobs.dtype).eps).log_()
        outcomes = torch.cat([self.logprobs.to(dtype), others.to(dtype)[..., None]], dim=-1)
        return outcomes.clamp_(min=torch.finfo(dtype).min)


class OutcomePartials(NamedTuple):
    """Contribution of one shard to the outcomes."""

    others: RowStatistics
    """Maximum over all columns, and sum of exponentials over the columns that are no top token, [rows] each."""
    logits: Tensor
    """Logits of the top tokens, [rows, k], 0 on shards that do not hold them. The sum over shards is complete."""


@torch.no_grad()
def top_candidates(logits_v: Tensor, k: int, vocab_start: int) -> tuple[Tensor, Tensor]:
    """Return the min(k, v) largest logits of one shard. The k largest of the vocabulary are among those of all shards.

    Args:
        logits_v: [rows, v] logits of this shard, any floating dtype.
        k: number of top tokens.
        vocab_start: token id of the shard's first column.

    Returns:
        (values [rows, min(k, v)] in the dtype of the logits, their int64 ids in the whole vocabulary). No gradient.
    """
    found = [torch.topk(logits_v[chunk], min(k, logits_v.shape[1]), dim=-1) for chunk in row_chunks(*logits_v.shape)]
    values, indices = (torch.cat(parts) for parts in zip(*found))
    return values, indices + vocab_start


@torch.no_grad()
def outcome_partials(
    logits_v: Tensor, indices: Tensor, vocab_start: int, temperature: float, dtype: torch.dtype
) -> OutcomePartials:
    """Return the contribution of one shard.

    Args:
        logits_v: [rows, v] finite logits of this shard, any floating dtype.
        indices: [rows, k] int64 ids in the whole vocabulary, different within a row.
        vocab_start: token id of the shard's first column.
        temperature: divisor of the logits, > 0.
        dtype: dtype of the result and of the arithmetic.
    """
    rows, columns = logits_v.shape
    maximum, others = (torch.empty(rows, dtype=dtype, device=logits_v.device) for _ in range(2))
    picked = torch.empty(indices.shape, dtype=dtype, device=logits_v.device)
    for chunk in row_chunks(rows, columns):
        logits = logits_v[chunk].to(dtype)
        inside, local = _local(indices[chunk], vocab_start, columns)
        picked[chunk] = logits.gather(-1, local).masked_fill_(~inside, 0.0)
        maximum[chunk] = logits.max(dim=-1).values
        exponentials = (logits - maximum[chunk, None]).div_(temperature).exp_()
        others[chunk] = _without(exponentials, inside, local).sum(dim=-1)
    return OutcomePartials(RowStatistics(maximum, others), picked)


def outcome_logprobs(others: RowStatistics, logits: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities of the top tokens and, last, of all other tokens together.

    Args:
        others: statistics of `outcome_partials`, merged over all shards.
        logits: [rows, k] logits of `outcome_partials`, summed over all shards.
        temperature: divisor of the logits, > 0.

    Returns:
        [rows, k + 1], all finite.
    """
    shifted = (logits - others.maximum[:, None]) / temperature
    normaliser = (shifted.exp().sum(dim=-1) + others.sum_exp).log()
    rest = others.sum_exp.clamp(min=torch.finfo(logits.dtype).tiny).log()
    return torch.cat([shifted, rest[:, None]], dim=-1) - normaliser[:, None]


def outcome_divergence(student: Tensor, teacher: Tensor, divergence: TokenDivergence) -> tuple[Tensor, Tensor]:
    """Return the divergence over outcomes, and its gradient, from complete log-probabilities of both models.

    Args:
        student, teacher: [rows, k + 1] log-probabilities of distributions over the outcomes.
        divergence: kind of divergence.

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
    """Return the gradient with respect to one shard of the logits, given that of the log-weights of the outcomes.

        dD/dlogit_i = gradient_i / temperature                                     for a top token
                    = gradient_others * q_i / q_others / temperature               for any other

    Args:
        logits_v, indices, vocab_start, temperature: as for `outcome_partials`.
        others: statistics merged over all shards.
        gradient: [rows, k + 1] gradient of `outcome_divergence`, times the gradient of each row's divergence.

    Returns:
        [rows, v] in the dtype of `logits_v`.
    """
    result = torch.empty_like(logits_v)
    gradient = gradient / temperature
    share = gradient[:, -1] / others.sum_exp.clamp(min=torch.finfo(gradient.dtype).tiny)
    for chunk in row_chunks(*logits_v.shape):
        inside, local = _local(indices[chunk], vocab_start, logits_v.shape[1])
        columns = (logits_v[chunk].to(gradient.dtype) - others.maximum[chunk, None]).div_(temperature).exp_()
        columns = _without(columns, inside, local).mul_(share[chunk, None])
        result[chunk] = columns.scatter_add_(-1, local, gradient[chunk, :-1].masked_fill(~inside, 0.0))
    return result


def _local(indices: Tensor, vocab_start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return a mask of the ids that this shard holds, and their columns (an arbitrary column for the other ids)."""
    local = indices - vocab_start
    return (local >= 0) & (local < columns), local.clamp(0, columns - 1)


def _without(columns: Tensor, inside: Tensor, local: Tensor) -> Tensor:
    """Set the top tokens of non-negative columns to 0, in place.

    The reduction is a minimum, because an id of another shard is clamped to some column too and must leave it
    unchanged, whatever the order of the updates.
    """
    bound = torch.zeros_like(local, dtype=columns.dtype).masked_fill_(~inside, float("inf"))
    return columns.scatter_reduce_(-1, local, bound, reduce="amin")
