"""Divergence of a student from a teacher where the vocabulary is split over tensor-parallel ranks.

Every function forms a partial result from this rank's columns, runs a collective, and combines the partial results. The
pure halves are `functional/distillation_loss.py` and `functional/distillation_top_tokens.py`. Full logits are never
gathered, on either side. Ranks exchange 4 numbers per row and rank (gathered) and 2 per row (summed). With top tokens
they exchange 2 per row and rank, and k per row.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ral.functional.distillation_loss import (
    RowStatistics,
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
from megatron_ral.parallel.collectives import all_reduce_sum_, gather_shards


def _merge(local: tuple[RowStatistics, ...], temperature: float, group: dist.ProcessGroup) -> list[RowStatistics]:
    """Return the statistics of several models over all shards, gathered in one call and merged in rank order."""
    shards = gather_shards(torch.stack([tensor for rows in local for tensor in rows]), group)
    return [
        merge_statistics([RowStatistics(*shard[2 * index : 2 * index + 2]) for shard in shards], temperature)
        for index in range(len(local))
    ]


class _VocabParallelDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_v: Tensor, teacher_v: Tensor, divergence: TokenDivergence, group: dist.ProcessGroup):
        dtype = wide(student_v, teacher_v)
        local = tuple(local_statistics(logits, divergence.temperature, dtype) for logits in (student_v, teacher_v))
        student, teacher = _merge(local, divergence.temperature, group)
        sums = all_reduce_sum_(divergence_partials(student_v, teacher_v, student, teacher, divergence), group)
        ctx.save_for_backward(student_v, teacher_v, *student, *teacher, sums[1].clone())
        ctx.divergence = divergence
        return sums[0].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        student_v, teacher_v, *rows, mean = ctx.saved_tensors
        student, teacher = RowStatistics(*rows[:2]), RowStatistics(*rows[2:])
        return divergence_gradient(student_v, teacher_v, student, teacher, mean, grad, ctx.divergence), None, None, None


def vocab_parallel_divergence(
    student_v: Tensor, teacher_v: Tensor, divergence: TokenDivergence, group: dist.ProcessGroup
) -> Tensor:
    """Return the divergence of the student from the teacher over the whole vocabulary.

    Both logits are saved for the backward pass in their own dtype, with 5 numbers per row.

    Args:
        student_v: [..., v] this rank's columns of the student's logits, finite, any floating dtype; carries gradient.
        teacher_v: [..., v] the same columns of the teacher's logits; no gradient. Teacher and student must be cut and
            padded alike. A teacher with another tensor-parallel size or vocabulary size has to send its top tokens
            instead, or its logits have to be cut like the student's first. Padded columns are -1e9 in both.
        divergence: Kind of divergence and its temperature.
        group: Tensor-parallel group. Rank i holds columns [i v, (i + 1) v).

    Returns:
        [...] in nats, >= 0, float32 (float64 for float64 logits), equal on all ranks of the group; carries gradient
        to `student_v`, once. Value and gradient are exactly 0 where the logits of a row are equal.

    Raises:
        ValueError: the shapes of student and teacher differ.

    Source: RAL paper (arXiv 2602.04884) eq. (6), GKD (arXiv 2306.13649) eq. (1).
    """
    if student_v.shape != teacher_v.shape:
        raise ValueError(
            f"this rank's logits are {tuple(student_v.shape)} of the student and {tuple(teacher_v.shape)} "
            f"of the teacher: cut both alike (rows, vocabulary, padding, tensor ranks), or use top tokens"
        )
    columns = student_v.shape[-1]
    rows = _VocabParallelDivergence.apply(
        student_v.reshape(-1, columns), teacher_v.detach().reshape(-1, columns), divergence, group
    )
    return rows.view(student_v.shape[:-1])


def _outcomes(
    logits_v: Tensor, indices: Tensor, temperature: float, dtype: torch.dtype, group: dist.ProcessGroup
) -> tuple[RowStatistics, Tensor]:
    """Return statistics of all columns but the top tokens, and log-probabilities [rows, k + 1], over all shards."""
    local = outcome_partials(logits_v, indices, _start(logits_v, group), temperature, dtype)
    (others,) = _merge((local.others,), temperature, group)
    return others, outcome_logprobs(others, all_reduce_sum_(local.logits, group), temperature)


def _start(logits_v: Tensor, group: dist.ProcessGroup) -> int:
    return logits_v.shape[-1] * dist.get_rank(group)


class _VocabParallelTopDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, student_v: Tensor, indices: Tensor, teacher: Tensor, divergence: TokenDivergence, group: dist.ProcessGroup
    ):
        others, student = _outcomes(student_v, indices, divergence.temperature, teacher.dtype, group)
        value, gradient = outcome_divergence(student, teacher, divergence)
        ctx.save_for_backward(student_v, indices, *others, gradient)
        ctx.start, ctx.temperature = _start(student_v, group), divergence.temperature
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        student_v, indices, maximum, sum_exp, gradient = ctx.saved_tensors
        return (
            outcome_gradient(
                student_v,
                indices,
                ctx.start,
                RowStatistics(maximum, sum_exp),
                gradient * grad[:, None],
                ctx.temperature,
            ),
            None,
            None,
            None,
            None,
        )


def vocab_parallel_top_divergence(
    student_v: Tensor, teacher: TopTokens, divergence: TokenDivergence, group: dist.ProcessGroup
) -> Tensor:
    """Return the divergence over k + 1 outcomes: the teacher's k most likely tokens, and all other tokens together.

    The student's logits are saved for the backward pass in their own dtype, with 2 k + 3 numbers per row.

    Args:
        student_v: [..., v] this rank's columns of the student's logits, finite, any floating dtype; carries gradient.
        teacher: Top tokens of the teacher, equal on all ranks. Their log-probabilities must have been formed at the
            temperature of `divergence`, because they cannot be converted to another one.
        divergence: Kind of divergence and its temperature.
        group: Tensor-parallel group. Rank i holds columns [i v, (i + 1) v).

    Returns:
        [...] in nats, >= 0, float32 (float64 for float64 logits), equal on all ranks of the group; carries gradient
        to `student_v`, once. It is exactly 0 where teacher and student have equal logits, if the teacher's top tokens
        come from `vocab_parallel_top_tokens` in a group of the same size.

    Raises:
        ValueError: the rows of the student, of the indices and of the log-probabilities do not match.
    """
    shape, k = student_v.shape[:-1], teacher.indices.shape[-1]
    others = shape if teacher.others is None else teacher.others.shape
    if not teacher.indices.shape == teacher.logprobs.shape == (*shape, k) or others != shape:
        raise ValueError(
            f"student logits {tuple(student_v.shape)} do not go with the teacher's top tokens: indices "
            f"{tuple(teacher.indices.shape)}, logprobs {tuple(teacher.logprobs.shape)}, others "
            f"{tuple(others)}"
        )
    outcomes = teacher.outcomes(wide(student_v, teacher.logprobs)).detach()
    rows = _VocabParallelTopDivergence.apply(
        student_v.reshape(-1, student_v.shape[-1]),
        teacher.indices.reshape(-1, k),
        outcomes.reshape(-1, k + 1),
        divergence,
        group,
    )
    return rows.view(shape)


@torch.no_grad()
def vocab_parallel_top_tokens(logits_v: Tensor, k: int, temperature: float, group: dist.ProcessGroup) -> TopTokens:
    """Return the k most likely tokens of each row over all shards, most likely first.

    k candidates of every rank are gathered.

    Args:
        logits_v: [..., v] this rank's columns of the logits, finite.
        k: Number of tokens, from 1 to the size of the whole vocabulary.
        temperature: Temperature of the log-probabilities. It does not change which tokens are chosen.
        group: Tensor-parallel group. Rank i holds columns [i v, (i + 1) v).

    Returns:
        Top tokens with the log-mass of all others, in float32 (float64 for float64 logits), equal on all ranks; no
        gradient.

    Raises:
        ValueError: k is out of range.
    """
    columns, shape = logits_v.shape[-1], logits_v.shape[:-1]
    if not 1 <= k <= columns * group.size():
        raise ValueError(f"top tokens: k = {k} is not in 1 .. {columns * group.size()}, the size of the vocabulary")
    logits, dtype = logits_v.reshape(-1, columns), wide(logits_v)
    values, indices = top_candidates(logits, k, _start(logits_v, group))
    values = torch.cat(gather_shards(values.to(dtype), group), dim=-1)
    indices = torch.cat(gather_shards(indices, group), dim=-1)
    indices = indices.gather(-1, values.topk(k, dim=-1).indices)
    _, outcomes = _outcomes(logits, indices, temperature, dtype, group)
    return TopTokens(indices.view(*shape, k), outcomes[:, :-1].reshape(*shape, k), outcomes[:, -1].reshape(shape))
