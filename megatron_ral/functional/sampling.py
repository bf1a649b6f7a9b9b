"""Token sampling with one random stream per response instead of one per rank.

The stream of a response is keyed by (seed, step, prompt key, response number). A rollout is therefore the same however
prompts are spread over data-parallel ranks and micro-batches.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def uniform_stream(length: int, *identity: object) -> Tensor:
    """Return `length` uniform float64 numbers in [0, 1) that depend on `identity` alone, hashed with BLAKE2."""
    return torch.rand(length, generator=_generator(identity), dtype=torch.float64)


def normal_stream(length: int, *identity: object) -> Tensor:
    """Return `length` standard normal float64 numbers that depend on `identity` alone, hashed with BLAKE2."""
    return torch.randn(length, generator=_generator(identity), dtype=torch.float64)


def stream_seed(*identity: object) -> int:
    """Return the seed, below 2^63, of the streams that depend on `identity` alone, hashed with BLAKE2."""
    digest = hashlib.blake2b("\x1f".join(map(str, identity)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _generator(identity: tuple[object, ...]) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(*identity))


def sample_tokens(
    logits_XV: Tensor, uniform_X: Tensor, temperature: float, top_p: float = 1.0, on_host: bool = False
) -> Tensor:
    """Sample one token per row by the inverse CDF, with temperature and nucleus (top-p) truncation.

    Args:
        logits_XV: [X, V] logits of the whole vocabulary.
        uniform_X: [X] float64 in [0, 1), one draw per row.
        temperature: >= 0; 0 is greedy (the most likely token, the lowest id on ties).
        top_p: in (0, 1]. A token is drawn from the smallest set of most likely tokens whose probability reaches top_p.
        on_host: True to order float32 logits in host memory with NumPy. It does not change the result.

    Returns:
        [X] token ids (int64).
    """
    if temperature == 0:
        return logits_XV.argmax(dim=-1)
    probabilities = torch.softmax(logits_XV.double() / temperature, dim=-1)
    if on_host:
        _, token_ids = _ordered_on_host(logits_XV, torch.arange(logits_XV.shape[-1]).expand_as(logits_XV))
        ordered = probabilities.gather(-1, token_ids)
    else:
        ordered, token_ids = probabilities.sort(dim=-1, descending=True, stable=True)
    cumulative = ordered.cumsum(dim=-1)
    if top_p < 1.0:
        outside = cumulative - ordered >= top_p
        ordered = ordered.masked_fill(outside, 0.0)
        cumulative = ordered.cumsum(dim=-1)
    threshold = uniform_X.to(cumulative)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits_XV.shape[-1] - 1)
    # A draw close to 1 must not land in the truncated tail.
    last = (ordered > 0).sum(dim=-1, keepdim=True) - 1
    return token_ids.gather(-1, torch.minimum(index, last))[:, 0]


def likeliest_on_host(logits_Xv: Tensor, count: int) -> Tensor:
    """Return the ids of the `count` largest logits of each row, [X, count] int64, in no order.

    The logits are in host memory, where NumPy's partial sort takes a fifth of the time of `torch.topk`.
    """
    width = logits_Xv.shape[-1]
    return torch.as_tensor(np.argpartition(logits_Xv.numpy(), width - count, axis=-1)[:, width - count :])


_LOW = 0x7FFFFFFF


def _ordered_on_host(logits_XC: Tensor, ids_XC: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 logits in host memory in descending order, and their ids; of equal logits the lower id first.

    Rows are sorted as whole numbers, whose upper half is the logit and whose lower half is the id. The bits of a
    float32, read as a whole number, are in the order of the floats once those of negative ones are turned over.
    """
    bits = (logits_XC + 0.0).numpy().view(np.int32)  # -0 becomes 0, its equal
    keys = (bits ^ ((bits >> 31) & _LOW)).astype(np.int64) << 32 | (_LOW - ids_XC.numpy())
    keys.sort(axis=-1)
    keys = np.ascontiguousarray(keys[:, ::-1])
    bits = (keys >> 32).astype(np.int32)
    logits = (bits ^ ((bits >> 31) & _LOW)).view(np.float32)
    return torch.as_tensor(logits), torch.as_tensor(_LOW - (keys & _LOW))


def sample_candidates(
    logits_XC: Tensor,
    ids_XC: Tensor,
    least_X: Tensor,
    maximum_X: Tensor,
    total_X: Tensor,
    uniform_X: Tensor,
    temperature: float,
    top_p: float = 1.0,
    on_host: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sample as `sample_tokens` does, from the most likely tokens of each row alone.

    Args:
        logits_XC: [X, C] float32 logits of the candidates; among equal logits the lower id stands first, unless
            `on_host` is set.
        ids_XC: [X, C] token ids of the candidates.
        least_X: [X] bound above which every token of the vocabulary is a candidate; -inf where all tokens are.
        maximum_X: [X] largest logit of the vocabulary.
        total_X: [X] float64 sum over the whole vocabulary of exp((logit - maximum) / temperature).
        uniform_X, temperature, top_p: as for `sample_tokens`; temperature > 0.
        on_host: True to order the candidates with NumPy, in host memory. It does not change the result.

    Returns:
        ([X] int64 ids, [X] bool). The second is True where `sample_tokens` of the whole vocabulary draws the same id;
        elsewhere the candidates do not decide the draw, or logits are not a number.
    """
    order = None
    if on_host:
        logits, ids = _ordered_on_host(logits_XC, ids_XC)
    else:
        (logits, order), ids = logits_XC.sort(dim=-1, descending=True, stable=True), ids_XC
    ordered = ((logits.double() - maximum_X[:, None]) / temperature).exp() / total_X[:, None]
    cumulative = ordered.cumsum(dim=-1)
    whole = least_X == float("-inf")
    known = whole[:, None] | (
        logits > least_X[:, None]
    )  # a prefix: after it, tokens that are no candidates may come first
    last, reach = (ordered > 0).sum(dim=-1, keepdim=True) - 1, torch.ones_like(total_X)
    if top_p < 1.0:
        inside = cumulative - ordered < top_p
        last, reach = inside.sum(dim=-1, keepdim=True) - 1, (ordered * inside).sum(dim=-1)
    index = torch.searchsorted(cumulative, (uniform_X * reach)[:, None], right=True)
    index = torch.minimum(index, last).clamp(min=0)  # below 0 where logits are not a number
    settled = (whole | ((index if top_p == 1.0 else last)[:, 0] < known.sum(dim=-1))) & total_X.isfinite()
    return ids.gather(-1, index if order is None else order.gather(-1, index))[:, 0], settled
