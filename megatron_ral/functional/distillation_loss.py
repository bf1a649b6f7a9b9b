"""Divergence between next-token distributions of a student and a teacher, from vocabulary shards of both.

With V split over tensor-parallel ranks, every rank holds columns [start, start + v) of both models' logits. Two numbers
per row and model (a maximum and a sum of exponentials) give the softmax over all shards. After that, every divergence
and everything its gradient needs is a sum over columns:

    `local_statistics`    -> gather -> `merge_statistics`       (maximum, sum_exp of the whole vocabulary)
    `divergence_partials` -> sum    -> value and mean slope     (two numbers per row)
    `divergence_gradient`                                       (this shard's columns; no collective)

This file holds the local steps, `parallel/vocab_distillation.py` the collectives between them. Rows are processed in
chunks, in float32 (float64 where the logits are float64), so that no temporary tensor has the size rows x v.

P is the teacher and Q the student. Names follow `attention/divergence.py`, where the student's place is the policy's:

    forward_kl  KL(P || Q)                                              covers the teacher's mass
    reverse_kl  KL(Q || P)                                              seeks the teacher's modes (L_GKD of the paper)
    jsd         beta KL(P || M) + (1 - beta) KL(Q || M),  M = beta P + (1 - beta) Q,  0 < beta < 1

beta is the weight of the *teacher*. jsd is bounded by the entropy of (beta, 1 - beta) and goes to 0 with beta and with
1 - beta: jsd / beta -> forward_kl, jsd / (1 - beta) -> reverse_kl. A beta near 0 or 1 therefore acts first of all as a
small coefficient, and beta = 0 or 1 is refused. Names in other projects:

    TRL   `GKDTrainer` has one number, beta: 0 is forward_kl, 1 is reverse_kl, values between are jsd with the same beta
          as here. The loss jumps at both ends (issue 6780). Before its pull request 3043 beta weighted the student.
          huggingface/trl f2cd57710ae345ea6428ae95363267fcf38a3dc8, trl/experimental/gkd/gkd_trainer.py:239-300.
    verl  `forward_kl_topk` is the sum over the teacher's k tokens of p (log p - log q). The other tokens are left out,
          so that the sum can be negative and is clamped at 0. `kl` and `k1` to `k3` estimate reverse_kl from the
          sampled token. There is no jsd. verl-project/verl 1dda039b9c6311889a9c9a26040677e1254814f9,
          verl/trainer/distillation/losses.py, megatron/losses.py:62-262. Its recipe has `kl`, `rkl` and `jsd` on the
          teacher's k tokens, with beta as here and clamped to [1e-6, 1 - 1e-6]: verl-project/verl-recipe
          cb313bcd2bbd58256b3bd0e85e376c2c8dfadc98, gkd/megatron/megatron_distill_losses.py.
"""

from dataclasses import dataclass
from typing import Callable, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 18
"""Fewest elements of a chunk of rows, so that a chunk is worth the start of its kernels."""
_NUM_CHUNKS = 64
"""Largest number of chunks of a large matrix, up to rounding."""


@dataclass(frozen=True)
class TokenDivergence:
    """Kind of divergence and temperature of both distributions.

    Raises:
        ValueError: unknown kind, beta outside (0, 1), temperature <= 0.

    Source: GKD (arXiv 2306.13649) eq. (1) for `jsd`; RAL paper (arXiv 2602.04884) eq. (6) for `reverse_kl`.
    """

    kind: str = "reverse_kl"
    """Name of the divergence: forward_kl, reverse_kl or jsd."""
    beta: float = 0.5
    """Weight of the teacher in the mixture, in (0, 1); only jsd reads it."""
    temperature: float = 1.0
    """Divisor of the logits of both models before the softmax. The loss is not multiplied by temperature^2."""

    def __post_init__(self):
        if self.kind not in _KINDS:
            raise ValueError(f"divergence '{self.kind}' is not one of {', '.join(_KINDS)}")
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta = {self.beta} must lie strictly between 0 and 1; use forward_kl or reverse_kl for the limits"
            )
        if not self.temperature > 0.0:
            raise ValueError(f"temperature = {self.temperature} must be more than 0")

    def terms(self, log_ratio: Tensor, p: Tensor, q: Tensor) -> Tensor:
        """Return one term of the divergence per outcome. No term is negative, and it is 0 where log_ratio is 0.

        Args:
            log_ratio: log p - log q, finite, any shape.
            p, q: probabilities of the outcome under teacher and student; 0 is allowed. Both sum to 1 over all outcomes.
        """
        return _KINDS[self.kind].terms(log_ratio, p, q, self.beta)

    def slopes(self, log_ratio: Tensor, p: Tensor, q: Tensor) -> Tensor:
        """Return q dD/dq per outcome, up to q times a constant of the row. It is 0 where log_ratio is 0.

        The gradient follows as dD/d(log-weight of q) = slopes - q * sum(slopes), summed over all outcomes. Arguments:
        see `terms`.
        """
        return _KINDS[self.kind].slopes(log_ratio, p, q, self.beta)


class RowStatistics(NamedTuple):
    """Normaliser of the softmax of every row, over one shard or over all of them."""

    maximum: Tensor
    """Largest logit [rows], not divided by the temperature."""
    sum_exp: Tensor
    """Sum of exp((logit - maximum) / temperature), [rows]."""


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Split rows into chunks so small that a dozen temporaries of a chunk stay far below rows x columns."""
    size = max(1, max(_CHUNK_ELEMENTS, rows * columns // _NUM_CHUNKS) // columns)
    for start in range(0, max(rows, 1), size):
        yield slice(start, min(start + size, rows))


def wide(*tensors: Tensor) -> torch.dtype:
    """Return float32, or float64 where one of the tensors is float64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


@torch.no_grad()
def local_statistics(logits_v: Tensor, temperature: float, dtype: torch.dtype) -> RowStatistics:
    """Return the statistics of one shard.

    Args:
        logits_v: [rows, v] finite logits of this shard, any floating dtype.
        temperature: divisor of the logits, > 0.
        dtype: dtype of the result and of the arithmetic.
    """
    maximum, sum_exp = (torch.empty(len(logits_v), dtype=dtype, device=logits_v.device) for _ in range(2))
    for chunk in row_chunks(*logits_v.shape):
        logits = logits_v[chunk].to(dtype)
        maximum[chunk] = logits.max(dim=-1).values
        sum_exp[chunk] = (logits - maximum[chunk, None]).div_(temperature).exp_().sum(dim=-1)
    return RowStatistics(maximum, sum_exp)


def merge_statistics(shards: Sequence[RowStatistics], temperature: float) -> RowStatistics:
    """Return the statistics over all shards. A shard that holds only padding (-1e9) adds exactly 0.

    The order of the sum is fixed, so that equal logits have bit-identical statistics. An all-reduce gives no such
    guarantee.

    Args:
        shards: statistics of every shard, in the order of the tensor-parallel ranks.
        temperature: divisor of the logits, > 0.
    """
    maxima = torch.stack([shard.maximum for shard in shards])
    maximum = maxima.max(dim=0).values
    parts = torch.stack([shard.sum_exp for shard in shards])
    return RowStatistics(maximum, (parts * ((maxima - maximum) / temperature).exp()).sum(dim=0))


@torch.no_grad()
def divergence_partials(
    student_v: Tensor, teacher_v: Tensor, student: RowStatistics, teacher: RowStatistics, divergence: TokenDivergence
) -> Tensor:
    """Return the sums of one shard. Added over shards they are the divergence and the mean slope of each row.

        D    = sum_i terms_i          forward_kl: p_i E(-d_i)      reverse_kl: q_i E(d_i)
                                      jsd: beta p_i E(ln m_i/p_i) + (1 - beta) q_i E(ln m_i/q_i)
        mean = sum_i slopes_i         forward_kl: q_i - p_i         reverse_kl: -q_i d_i
                                      jsd: (1 - beta) q_i ln q_i/m_i
        d_i  = ln p_i - ln q_i,   E(x) = e^x - 1 - x >= 0

    The terms are those of the definition plus multiples of p_i - q_i, which sum to 0. None is negative, so that nothing
    cancels where the student is close to the teacher. d_i is formed from the difference of the logits, not of the
    log-probabilities. Equal logits give exactly 0 and 0.

    Args:
        student_v, teacher_v: [rows, v] finite logits of this shard, any floating dtype. Padded columns (-1e9 in both)
            add exactly 0. A column that is -1e9 in the teacher alone counts like any other logit.
        student, teacher: statistics merged over all shards.
        divergence: kind and temperature.

    Returns:
        [2, rows] in the dtype of the statistics: value in nats, >= 0, and mean slope. No gradient.

    Source: GKD (arXiv 2306.13649) eq. (1); forms derived here.
    """
    result = student.sum_exp.new_empty(2, len(student_v))
    for chunk in row_chunks(*student_v.shape):
        columns = _columns(student_v, teacher_v, student, teacher, divergence.temperature, chunk)
        result[0, chunk] = divergence.terms(*columns).sum(dim=-1)
        result[1, chunk] = divergence.slopes(*columns).sum(dim=-1)
    return result


@torch.no_grad()
def divergence_gradient(
    student_v: Tensor,
    teacher_v: Tensor,
    student: RowStatistics,
    teacher: RowStatistics,
    mean: Tensor,
    grad: Tensor,
    divergence: TokenDivergence,
) -> Tensor:
    """Return the gradient of sum(grad * D) with respect to this shard of the student's logits.

        dD/dlogit_i = (slopes_i - q_i * mean) / temperature

    The subtracted mean makes the gradient sum to 0 over the vocabulary, whatever the rounding of the statistics. A
    rounding error of the statistics shifts all d_i alike and cancels. The gradient is exactly 0 where the logits are
    equal.

    Args: the arguments of `divergence_partials`, and
        mean: [rows] second row of `divergence_partials`, summed over all shards.
        grad: [rows] gradient of each row's divergence.

    Returns:
        [rows, v] in the dtype of `student_v`.
    """
    result = torch.empty_like(student_v)
    for chunk in row_chunks(*student_v.shape):
        log_ratio, p, q = _columns(student_v, teacher_v, student, teacher, divergence.temperature, chunk)
        slopes = divergence.slopes(log_ratio, p, q).addcmul_(q, mean[chunk, None], value=-1)
        result[chunk] = slopes.mul_((grad[chunk] / divergence.temperature)[:, None])
    return result


def _columns(
    student_v: Tensor,
    teacher_v: Tensor,
    student: RowStatistics,
    teacher: RowStatistics,
    temperature: float,
    chunk: slice,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p - log q, p and q of a chunk of rows."""
    student, teacher = (RowStatistics(*(tensor[chunk, None] for tensor in rows)) for rows in (student, teacher))
    dtype = student.sum_exp.dtype
    q_logits, p_logits = student_v[chunk].to(dtype), teacher_v[chunk].to(dtype)
    shift = (teacher.maximum - student.maximum) / temperature + (teacher.sum_exp / student.sum_exp).log()
    log_ratio = (p_logits - q_logits).div_(temperature).sub_(shift)
    p = (p_logits - teacher.maximum).div_(temperature).exp_().div_(teacher.sum_exp)
    q = (q_logits - student.maximum).div_(temperature).exp_().div_(student.sum_exp)
    return log_ratio, p, q


class _Kind(NamedTuple):
    """Formulas of one divergence, as functions of (log p - log q, p, q, beta)."""

    terms: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    slopes: Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _excess(weight: Tensor, x: Tensor, moved: Tensor) -> Tensor:
    """Return weight * (e^x - 1 - x), never negative, where `moved` = weight * e^x is known without overflow.

    For small x the direct form cancels, so that the series is used. At |x| = 0.5 it is truncated below 1e-8, or below
    1e-15 in float64.
    """
    series = torch.ones_like(x)
    for power in range(9 if x.dtype == torch.float32 else 14, 2, -1):
        series = series.mul_(x).div_(power).add_(1)
    near = series.mul_(x).mul_(x).mul_(weight).mul_(0.5)
    return torch.where(x.abs() < 0.5, near, moved - weight * (1 + x))


def _difference(log_ratio: Tensor, p: Tensor, q: Tensor, beta: float) -> Tensor:
    """Return q - p from the log-ratio, which is exact where p and q are close."""
    return torch.sign(log_ratio).mul_(torch.maximum(p, q)).mul_(torch.expm1(-log_ratio.abs()))


def _to_mixture(log_ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return ln m/p and ln m/q with m = beta p + (1 - beta) q.

    The smaller of the two is log1p of a number in (-1, 0]; the other follows from it and the log-ratio.
    """
    share = torch.where(log_ratio > 0, log_ratio.new_full((), 1.0 - beta), beta)
    smaller = share.mul_(torch.expm1(-log_ratio.abs())).log1p_()
    return smaller + (-log_ratio).clamp_(min=0), smaller + log_ratio.clamp(min=0)


def _jsd_terms(log_ratio: Tensor, p: Tensor, q: Tensor, beta: float) -> Tensor:
    from_p, from_q = _to_mixture(log_ratio, beta)
    mixture = beta * p + (1.0 - beta) * q
    return _excess(p, from_p, mixture).mul_(beta).add_(_excess(q, from_q, mixture), alpha=1.0 - beta)


_KINDS = {
    "forward_kl": _Kind(lambda log_ratio, p, q, _: _excess(p, -log_ratio, q), _difference),
    "reverse_kl": _Kind(lambda log_ratio, p, q, _: _excess(q, log_ratio, p), lambda log_ratio, p, q, _: -q * log_ratio),
    "jsd": _Kind(_jsd_terms, lambda log_ratio, p, q, beta: _to_mixture(log_ratio, beta)[1].mul_(q).mul_(beta - 1.0)),
}
