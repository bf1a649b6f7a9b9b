"""Sampling of tokens whose randomness belongs to the sample, not to the rank.

Every response draws from its own stream, keyed by (seed, step, prompt key, response number). A rollout is therefore
the same however prompts are spread over data-parallel ranks and micro-batches.
"""

import hashlib

import torch
from torch import Tensor


def uniform_stream(length: int, *identity: object) -> Tensor:
    """`length` uniform float64 numbers in [0, 1) that depend on `identity` alone (hashed with BLAKE2)."""
    digest = hashlib.blake2b("\x1f".join(map(str, identity)).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(length, generator=generator, dtype=torch.float64)


def sample_tokens(logits_XV: Tensor, uniform_X: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """Inverse-CDF sampling of one token per row with temperature and nucleus (top-p) truncation.

    Args:
        logits_XV: [X, V] logits, whole vocabulary.
        uniform_X: [X] float64 in [0, 1), one draw per row.
        temperature: >= 0; 0 means greedy (the most likely token, the lowest id on ties).
        top_p: in (0, 1]; the smallest set of most likely tokens whose probability reaches top_p is kept.

    Returns:
        [X] token ids (int64).
    """
    if temperature == 0:
        return logits_XV.argmax(dim=-1)
    probabilities = torch.softmax(logits_XV.double() / temperature, dim=-1)
    ordered, token_ids = probabilities.sort(dim=-1, descending=True, stable=True)
    cumulative = ordered.cumsum(dim=-1)
    if top_p < 1.0:
        outside = cumulative - ordered >= top_p
        ordered = ordered.masked_fill(outside, 0.0)
        cumulative = ordered.cumsum(dim=-1)
    threshold = uniform_X.to(cumulative)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits_XV.shape[-1] - 1)
    # A draw on the very end of the scale must not land in the truncated tail.
    last = (ordered > 0).sum(dim=-1, keepdim=True) - 1
    return token_ids.gather(-1, torch.minimum(index, last))[:, 0]


def sample_candidates(
    logits_XC: Tensor,
    ids_XC: Tensor,
    least_X: Tensor,
    maximum_X: Tensor,
    total_X: Tensor,
    uniform_X: Tensor,
    temperature: float,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`sample_tokens` from the most likely tokens alone, where these decide.

    Args:
        logits_XC: [X, C] float32 logits of candidates; of equal ones the lower id stands first.
        ids_XC: [X, C] their ids.
        least_X: [X] every token above this logit is a candidate (-inf: all are).
        maximum_X: [X] largest logit.
        total_X: [X] float64 sum over the whole vocabulary of exp((logit - maximum) / temperature).
        uniform_X, temperature, top_p: as `sample_tokens`; temperature > 0.

    Returns:
        ([X] int64 ids, [X] bool: whether the id is what `sample_tokens` of the whole vocabulary draws).
    """
    logits, order = logits_XC.sort(dim=-1, descending=True, stable=True)
    ordered = ((logits.double() - maximum_X[:, None]) / temperature).exp() / total_X[:, None]
    cumulative = ordered.cumsum(dim=-1)
    whole = least_X == float("-inf")
    known = whole[:, None] | (logits > least_X[:, None])  # a prefix; behind it others may have to stand between
    last, reach = (ordered > 0).sum(dim=-1, keepdim=True) - 1, torch.ones_like(total_X)
    if top_p < 1.0:
        inside = cumulative - ordered < top_p
        last, reach = inside.sum(dim=-1, keepdim=True) - 1, (ordered * inside).sum(dim=-1)
    index = torch.searchsorted(cumulative, (uniform_X * reach)[:, None], right=True)
    index = torch.minimum(index, last)
    settled = whole | ((index if top_p == 1.0 else last)[:, 0] < known.sum(dim=-1))
    return ids_XC.gather(-1, order.gather(-1, index))[:, 0], settled
