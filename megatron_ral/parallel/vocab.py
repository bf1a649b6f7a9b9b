"""Log-probabilities, entropy and most likely tokens from logits whose vocabulary is split over tensor-parallel ranks.

Local partial -> collective -> combine: the pure halves are `functional/logprobs.py`. Full logits are never gathered.
"""

from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ral.functional.logprobs import (
    VocabPartials, combine_logprobs, entropy_gradient, logprob_gradient, vocab_partials)
from megatron_ral.parallel.collectives import all_reduce_max_, all_reduce_sum_, gather_shards


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_v: Tensor, targets: Tensor, group: dist.ProcessGroup):
        logits = logits_v.float()
        start = logits.shape[-1] * dist.get_rank(group)
        maximum = all_reduce_max_(logits.max(dim=-1).values.contiguous(), group)
        local = vocab_partials(logits, targets, maximum, start)
        sums = all_reduce_sum_(torch.stack([local.sum_exp, local.target_logit, local.weighted_logit]), group)
        logprobs, entropy = combine_logprobs(VocabPartials(*sums))
        ctx.save_for_backward(logits_v, targets, maximum, sums)
        ctx.start = start
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs nothing in the backward pass
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs: Optional[Tensor], grad_entropy: Optional[Tensor]):
        logits_v, targets, maximum, sums = ctx.saved_tensors
        total, logits, parts = VocabPartials(*sums), logits_v.float(), []
        if grad_logprobs is not None:
            parts.append(logprob_gradient(logits, targets, maximum, total.sum_exp, grad_logprobs, ctx.start))
        if grad_entropy is not None:
            parts.append(entropy_gradient(logits, maximum, total, grad_entropy))
        return sum(parts[1:], parts[0]).to(logits_v.dtype), None, None


def vocab_parallel_logprobs(logits_v: Tensor, targets: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row, in float32.

    Args:
        logits_v: [..., v] this rank's columns of the logits; carries gradient.
        targets: [...] int64 ids in the whole vocabulary.
        group: tensor-parallel group; rank i holds columns [i v, (i + 1) v).

    Returns:
        (logprobs [...], entropy [...] in nats), equal on all ranks of the group; both carry gradient to the logits.
    """
    return _VocabParallelLogprobs.apply(logits_v, targets, group)


@torch.no_grad()
def vocab_parallel_argmax(logits_v: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Id in the whole vocabulary of each row's largest logit; of equal ones the lowest id.

    Args:
        logits_v, group: as `vocab_parallel_logprobs`.

    Returns:
        [...] int64, equal on all ranks of the group.
    """
    value, index = logits_v.max(dim=-1)
    values = torch.stack(gather_shards(value.contiguous(), group))
    indices = torch.stack(gather_shards(index + logits_v.shape[-1] * dist.get_rank(group), group))
    return indices.gather(0, values.argmax(dim=0, keepdim=True))[0]
