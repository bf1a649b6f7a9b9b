"""Log-probabilities, entropy, most likely tokens and sampled tokens where the vocabulary is split over tensor ranks.

Every function forms a partial result from this rank's columns, runs a collective, and combines the partial results. The
pure halves are `functional/logprobs.py` and `functional/sampling.py`. Full logits are never gathered, except for the
rows of `vocab_parallel_sample` whose draw its candidates do not decide.
"""

from typing import Optional, Sequence

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
from megatron_ral.functional.sampling import sample_candidates, sample_tokens
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
    def backward(ctx, *grads: Optional[Tensor]):
        grad_logprobs, grad_entropy = grads
        logits_v, targets, maximum, sums = ctx.saved_tensors
        total, logits, parts = VocabPartials(*sums), logits_v.float(), []
        if grad_logprobs is not None:
            parts.append(logprob_gradient(logits, targets, maximum, total.sum_exp, grad_logprobs, ctx.start))
        if grad_entropy is not None:
            parts.append(entropy_gradient(logits, maximum, total, grad_entropy))
        return sum(parts[1:], parts[0]).to(logits_v.dtype), None, None


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


@torch.no_grad()
def vocab_parallel_sample(
    logits_Xv: Tensor,
    uniform_X: Tensor,
    temperature: float,
    top_p: float,
    group: dist.ProcessGroup,
    *,
    num_tokens: int = 0,
    forbidden: Sequence[int] = (),
    num_candidates: int = 512,
) -> Tensor:
    """Sample one token for each row from the whole vocabulary, like `functional.sampling.sample_tokens`.

    Every rank contributes its `num_candidates` largest logits and a sum of exponentials. They are enough if the draw
    falls on one of these candidates. The whole vocabulary is gathered for the other rows: those with a flat
    distribution or a draw from the tail.

    Args:
        logits_Xv: [X, v] this rank's columns of the logits.
        uniform_X: [X] uniform numbers in [0, 1), equal on all ranks.
        temperature: Divisor of the logits; 0 takes the most likely token.
        top_p: Mass of the most likely tokens to sample from.
        group: Tensor-parallel group. Rank i holds columns [i v, (i + 1) v).
        num_tokens: Number of ids, from the first, that may be drawn; 0 allows all.
        forbidden: Ids that are never drawn, at any temperature.
        num_candidates: Number of candidates per rank. It does not change the result.

    Returns:
        [X] int64 on the device of the logits, equal on all ranks of the group; no gradient.
    """
    start = logits_Xv.shape[-1] * dist.get_rank(group)
    logits = _allowed_logits(logits_Xv, start, num_tokens, forbidden)
    if temperature == 0:
        return vocab_parallel_argmax(logits, group)
    count = min(num_candidates, logits.shape[-1])
    if count < logits.shape[-1]:
        ids = logits.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values  # of equal logits the lower id first
        candidates = logits.gather(-1, ids)
        least = candidates.amin(dim=-1)  # bound on the logits that this rank does not contribute
    else:
        ids, candidates = torch.arange(count, device=logits.device).expand_as(logits), logits
        least = torch.full_like(candidates[:, 0], float("-inf"))
    maximum = all_reduce_max_(candidates.amax(dim=-1), group)
    total = all_reduce_sum_(((logits.double() - maximum[:, None]) / temperature).exp_().sum(dim=-1), group)
    token, settled = sample_candidates(
        torch.cat(gather_shards(candidates, group), dim=-1),
        torch.cat(gather_shards(ids + start, group), dim=-1),
        all_reduce_max_(least, group),
        maximum,
        total,
        uniform_X.to(total),
        temperature,
        top_p,
    )
    if group.size() > 1:  # ranks may round differently, so that one of them has to decide
        message = torch.where(settled, token, -1)
        dist.broadcast(message, src=dist.get_process_group_ranks(group)[0], group=group)
        token, settled = message, message >= 0
    open_rows = (~settled).nonzero()[:, 0]
    if len(open_rows):
        whole = torch.cat(gather_shards(logits[open_rows], group), dim=-1)
        token[open_rows] = sample_tokens(whole, uniform_X.to(total)[open_rows], temperature, top_p)
        if group.size() > 1:
            dist.broadcast(token, src=dist.get_process_group_ranks(group)[0], group=group)
    return token


def _allowed_logits(logits_Xv: Tensor, start: int, num_tokens: int, forbidden: Sequence[int]) -> Tensor:
    """Return the logits in float32, those of tokens that may not be drawn at -inf. The given tensor stays as it is."""
    logits, width = logits_Xv.float(), logits_Xv.shape[-1]
    if num_tokens and start + width > num_tokens:
        columns = torch.arange(start, start + width, device=logits.device)
        logits = logits.masked_fill(columns >= num_tokens, float("-inf"))
    own = [token - start for token in forbidden if start <= token < start + width]
    if own and logits is logits_Xv:
        logits = logits.clone()
    for column in own:  # one by one, because a list of columns would be copied to the device at every step
        logits[:, column] = float("-inf")
    return logits
