"""Log-probabilities from vocabulary shards: local partial -> collective -> combine.

With V split over tensor-parallel ranks every rank holds logits[..., start : start + v]. Three numbers per row have to
cross ranks (a maximum, a sum of exponentials, the target's logit); a fourth sum gives the entropy. The pure halves are
here, the collective is in `parallel/vocab.py`. All in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VocabPartials:
    """Sums over one vocabulary shard, each of the shape of the targets; adding them over shards completes them."""

    sum_exp: Tensor
    """sum exp(logit - maximum)"""
    target_logit: Tensor
    """logit - maximum of the target, 0 on shards that do not hold it"""
    weighted_logit: Tensor
    """sum exp(logit - maximum) * (logit - maximum), for the entropy"""


def vocab_partials(logits_v: Tensor, targets: Tensor, maximum: Tensor, vocab_start: int) -> VocabPartials:
    """Partial sums of one shard.

    Args:
        logits_v: [..., v] float32 logits of this shard.
        targets: [...] token ids in the whole vocabulary.
        maximum: [...] maximum logit over *all* shards.
        vocab_start: id of the shard's first column.
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
    """(log-probability of the target, entropy in nats) from partials summed over all shards."""
    log_normaliser = total.sum_exp.log()
    return total.target_logit - log_normaliser, log_normaliser - total.weighted_logit / total.sum_exp


def logprob_gradient(
    logits_v: Tensor, targets: Tensor, maximum: Tensor, sum_exp: Tensor, grad: Tensor, vocab_start: int
) -> Tensor:
    """Gradient of sum(grad * logprob) for one shard: grad * (onehot(target) - softmax)."""
    probabilities = (logits_v - maximum[..., None]).exp() / sum_exp[..., None]
    result = -grad[..., None] * probabilities
    local = targets - vocab_start
    inside = (local >= 0) & (local < logits_v.shape[-1])
    index = local.clamp(0, logits_v.shape[-1] - 1)[..., None]
    return result.scatter_add(-1, index, torch.where(inside, grad, torch.zeros_like(grad))[..., None])


def entropy_gradient(logits_v: Tensor, maximum: Tensor, total: VocabPartials, grad: Tensor) -> Tensor:
    """Gradient of sum(grad * entropy) for one shard: -grad * p * (log p + H), p = softmax.

    Args:
        logits_v: [..., v] float32 logits of this shard.
        maximum: [...] maximum logit over *all* shards.
        total: partials summed over all shards.
        grad: [...] gradient of each row's entropy.
    """
    shifted = logits_v - maximum[..., None]
    probabilities = shifted.exp() / total.sum_exp[..., None]
    # log p + H = shifted - its mean under p: the log of the normaliser cancels.
    return -grad[..., None] * probabilities * (shifted - (total.weighted_logit / total.sum_exp)[..., None])
