"""Log-probabilities and entropy from vocabulary shards, in three steps: local sums, collective, combination.

With V split over tensor-parallel ranks, every rank holds logits[..., start : start + v]. Three numbers per row cross
ranks: a maximum, a sum of exponentials and the target's logit. A fourth sum gives the entropy. This file holds the
local steps, `parallel/vocab.py` the collective between them. All arithmetic is in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VocabPartials:
    """Sums over one vocabulary shard, each with the shape of the targets. Their totals over shards are complete."""

    sum_exp: Tensor
    """Sum of exp(logit - maximum)."""
    target_logit: Tensor
    """Logit of the target minus the maximum, 0 on shards that do not hold the target."""
    weighted_logit: Tensor
    """Sum of exp(logit - maximum) * (logit - maximum), for the entropy."""


def vocab_partials(logits_v: Tensor, targets: Tensor, maximum: Tensor, vocab_start: int) -> VocabPartials:
    """Return the sums over one shard.

    Args:
        logits_v: [..., v] float32 logits of this shard.
        targets: [...] int64 token ids in the whole vocabulary.
        maximum: [...] float32 maximum logit over *all* shards.
        vocab_start: token id of the shard's first column.

    Returns:
        Sums with the shape of `targets`, float32; each carries gradient where `logits_v` does.
    """
    shifted = logits_v - maximum[..., None]
    exponentials = shifted.exp()
    local = targets - vocab_start
    inside = (local >= 0) & (local < logits_v.shape[-1])
    picked = shifted.gather(-1, local.clamp(0, logits_v.shape[-1] - 1)[..., None])[..., 0]
    return VocabPartials(
        sum_exp=exponentials.sum(-1),
        target_logit=torch.where(inside, picked, torch.zeros_like(picked)),
        weighted_logit=(exponentials * shifted).sum(-1),
    )


def combine_logprobs(total: VocabPartials) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each target and the entropy of each row, both in nats, float32.

    Args:
        total: sums of `vocab_partials`, added over all shards.
    """
    log_normaliser = total.sum_exp.log()
    return total.target_logit - log_normaliser, log_normaliser - total.weighted_logit / total.sum_exp


def logprob_gradient(
    logits_v: Tensor, targets: Tensor, maximum: Tensor, sum_exp: Tensor, grad: Tensor, vocab_start: int
) -> Tensor:
    """Return the gradient of sum(grad * logprob) for one shard: grad * (onehot(target) - softmax).

    Args:
        logits_v: [..., v] float32 logits of this shard.
        targets: [...] int64 token ids in the whole vocabulary.
        maximum: [...] maximum logit over *all* shards.
        sum_exp: [...] sum of exponentials over *all* shards.
        grad: [...] gradient of each row's log-probability.
        vocab_start: token id of the shard's first column.

    Returns:
        [..., v] float32.
    """
    probabilities = (logits_v - maximum[..., None]).exp() / sum_exp[..., None]
    result = -grad[..., None] * probabilities
    local = targets - vocab_start
    inside = (local >= 0) & (local < logits_v.shape[-1])
    index = local.clamp(0, logits_v.shape[-1] - 1)[..., None]
    return result.scatter_add(-1, index, torch.where(inside, grad, torch.zeros_like(grad))[..., None])


def entropy_gradient(logits_v: Tensor, maximum: Tensor, total: VocabPartials, grad: Tensor) -> Tensor:
    """Return the gradient of sum(grad * entropy) for one shard: -grad * p * (log p + H) with p = softmax.

    Args:
        logits_v: [..., v] float32 logits of this shard.
        maximum: [...] maximum logit over *all* shards.
        total: sums of `vocab_partials`, added over all shards.
        grad: [...] gradient of each row's entropy.

    Returns:
        [..., v] float32.
    """
    shifted = logits_v - maximum[..., None]
    probabilities = shifted.exp() / total.sum_exp[..., None]
    # The log of the normaliser cancels: log p + H = shifted - (mean of shifted under p).
    return -grad[..., None] * probabilities * (shifted - (total.weighted_logit / total.sum_exp)[..., None])
