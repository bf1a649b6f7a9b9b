"""Log-probabilities, entropy and most likely tokens where the vocabulary is split over tensor ranks.

Every function forms a partial result from this rank's columns, runs a collective, and combines the partial results. The
pure half is `functional/logprobs.py`. Full logits are never gathered.
"""

from typing import Iterator, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ral.functional.logprobs import (
    VocabPartials,
    combine_logprobs,
    entropy_gradient,
    logprob_gradient,
    vocab_partials,
)
from megatron_ral.parallel.collectives import all_reduce_max_, all_reduce_sum_, gather_shards


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_v: Tensor, targets: Tensor, group: dist.ProcessGroup):
        start = logits_v.shape[-1] * dist.get_rank(group)
        maximum = all_reduce_max_(logits_v.amax(dim=-1).float(), group)
        sums = maximum.new_empty(3, *maximum.shape)
        for rows in _chunks(maximum):
            logits, chosen = _rows(logits_v)[rows].float(), targets.flatten()[rows]
            local = vocab_partials(logits, chosen, maximum.flatten()[rows], start)
            sums.flatten(1)[:, rows] = torch.stack([local.sum_exp, local.target_logit, local.weighted_logit])
        all_reduce_sum_(sums, group)
        logprobs, entropy = combine_logprobs(VocabPartials(*sums))
        ctx.save_for_backward(logits_v, targets, maximum, sums)
        ctx.start = start
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs nothing in the backward pass
        return logprobs, entropy

    @staticmethod
    def backward(ctx, *grads: Optional[Tensor]):
        grad_logprobs, grad_entropy = grads
        logits_v, targets, maximum, sums = ctx.saved_tensors
        result = torch.empty_like(logits_v, memory_format=torch.contiguous_format)
        for rows in _chunks(maximum):
            logits, largest = _rows(logits_v)[rows].float(), maximum.flatten()[rows]
            total, parts = VocabPartials(*sums.flatten(1)[:, rows]), []
            if grad_logprobs is not None:
                grad = grad_logprobs.flatten()[rows]
                parts.append(logprob_gradient(logits, targets.flatten()[rows], largest, total.sum_exp, grad, ctx.start))
            if grad_entropy is not None:
                parts.append(entropy_gradient(logits, largest, total, grad_entropy.flatten()[rows]))
            _rows(result)[rows] = sum(parts[1:], parts[0]).to(result.dtype)
        return result, None, None


_ROWS_AT_A_TIME = 1024
"""Rows whose logits are in float32 at the same time, with three temporaries of their size."""


def _chunks(rows: Tensor) -> Iterator[slice]:
    """Yield slices of the flattened rows."""
    for first in range(0, rows.numel(), _ROWS_AT_A_TIME):
        yield slice(first, first + _ROWS_AT_A_TIME)


def _rows(tensor: Tensor) -> Tensor:
    """Return [..., v] as [X, v]."""
    return tensor.reshape(-1, tensor.shape[-1])


def vocab_parallel_logprobs(logits_v: Tensor, targets: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each target and the entropy of each row, in float32.

    Args:
        logits_v: [..., v] this rank's columns of the logits; carries gradient.
        targets: [...] int64 ids in the whole vocabulary.
        group: Tensor-parallel group. Rank i holds columns [i v, (i + 1) v).

    Returns:
        (logprobs [...], entropy [...] in nats), equal on all ranks of the group; both carry gradient to the logits.
    """
    return _VocabParallelLogprobs.apply(logits_v, targets, group)


@torch.no_grad()
def vocab_parallel_argmax(logits_v: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the id, in the whole vocabulary, of each row's largest logit. The lowest id wins among equal logits.

    Args:
        logits_v: [..., v] this rank's columns of the logits.
        group: Tensor-parallel group. Rank i holds columns [i v, (i + 1) v).

    Returns:
        [...] int64, equal on all ranks of the group; no gradient.
    """
    value, index = logits_v.max(dim=-1)
    values = torch.stack(gather_shards(value.contiguous(), group))
    indices = torch.stack(gather_shards(index + logits_v.shape[-1] * dist.get_rank(group), group))
    return indices.gather(0, values.argmax(dim=0, keepdim=True))[0]
