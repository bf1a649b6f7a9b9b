"""Head-averaged attention of chosen rows, and the divergence of a row from a target with its gradient to q and k.

Fused attention kernels return no weights, and eager ones keep a map per head. Here neither happens: rows are formed from
recorded queries and keys, piece by piece, and only their average over heads is kept. The gradient is the closed form of
`_RowDivergence`, whose backward pass forms the pieces again; no tensor of size heads x rows x keys is ever alive. On
CUDA Triton kernels do both (`attention_kernels`), elsewhere PyTorch does; `chosen_path` chooses.

Under tensor parallelism `head_mean_attention` gives the part of this rank's heads; the sum over ranks is the one
collective, and the backward pass needs none.
"""

import functools
import importlib.util
import logging
import math
from typing import Callable, Iterator, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from megatron_ral.attention.divergence import DIVERGENCES

logger = logging.getLogger(__name__)

_SMALL_PIECE, _LARGE_PIECE = 1 << 16, 1 << 18
_KERNEL_PIECE = 1 << 26
"""Elements of the slope map that kernels read at once (256 MB)."""
_KERNEL_WIDTH = 128
"""Widest head of the kernels: their tiles are of full width."""


class RowQK(NamedTuple):
    """Queries of rows and the keys they may see, after rotary embedding, for this rank's heads.

    Row r of response g sees the prompt's first `prompt_lengths` keys and the first r + 1 - lag keys of its response.
    """

    query_BGRnD: Tensor
    prompt_key_BPkD: Tensor
    response_key_BGTkD: Tensor
    """k divides n (grouped-query attention); T = 0 where rows see the prompt alone."""
    prompt_lengths_B: Tensor
    lag: int
    """0: a row sees its own token's key; 1: rows stand one place earlier (the rows that predict)."""
    scale: float
    """Softmax scale, usually 1 / sqrt(D)."""
    num_heads: int
    """Heads of all tensor ranks together."""

    @property
    def heads_per_key(self) -> int:
        """m: query heads that share a key/value head."""
        return self.query_BGRnD.shape[3] // self.prompt_key_BPkD.shape[2]

    @property
    def num_keys(self) -> int:
        """S = P + T, columns of a row."""
        return self.prompt_key_BPkD.shape[1] + self.response_key_BGTkD.shape[2]


class RowKeys(NamedTuple):
    """Which keys a row's policy is made of; the others are left out before it is renormalised."""

    columns_BS: Tensor
    """bool."""
    own_BR: Optional[Tensor] = None
    """int64: a column of each row that is left out too (its own token); None: none."""


_ALL = (slice(None),) * 3


def pieces(
    shape: Sequence[int], row_elements: int, elements: Optional[int] = None
) -> Iterator[tuple[slice, slice, slice]]:
    """Cut [B, G, R] rows of `row_elements` each into boxes of about so many elements (None: `_LARGE_PIECE`): whole
    batches where they are small, else responses, else rows."""
    B, G, R = shape
    elements = elements or _LARGE_PIECE
    rows = min(R, max(1, elements // row_elements))
    groups = min(G, max(1, elements // (row_elements * R))) if rows == R else 1
    batches = min(B, max(1, elements // (row_elements * R * G))) if groups == G else 1
    for b in range(0, B, batches):
        for g in range(0, G, groups):
            for r in range(0, R, rows):
                yield slice(b, min(b + batches, B)), slice(g, min(g + groups, G)), slice(r, min(r + rows, R))


def _weight_pieces(qk: RowQK) -> Iterator[tuple[slice, slice, slice]]:
    """Boxes whose weights for one key/value head are a small part of a map of rows, so that a handful of temporaries is
    far below one map."""
    shape = qk.query_BGRnD.shape[:3]
    return pieces(shape, qk.heads_per_key * qk.num_keys, max(_SMALL_PIECE, math.prod(shape) * qk.num_keys // 32))


class _Heads(NamedTuple):
    """One key/value head (or all of them, where the piece is small) of a piece, in float32 or wider."""

    index: slice
    query: Tensor
    """[b, h, g, m r, D], scaled; the m heads that share a key."""
    prompt_key: Tensor
    """[b, h, P, D]"""
    response_key: Tensor
    """[b, h, g, T, D]"""

    @property
    def rows(self) -> Tensor:
        """[b, h, g m r, D]: for the prompt's keys, which all responses share."""
        return self.query.flatten(2, 3)


def _heads(qk: RowQK, piece: tuple) -> Iterator[_Heads]:
    b, g, r = piece
    k = qk.prompt_key_BPkD.shape[2]
    dtype = torch.promote_types(qk.query_BGRnD.dtype, torch.float32)
    query = qk.query_BGRnD[b, g, r].unflatten(3, (k, -1))
    small = query.shape[:4].numel() * qk.heads_per_key * qk.num_keys <= _SMALL_PIECE
    for start in range(0, k, k if small else 1):
        h = slice(start, start + (k if small else 1))
        chosen = (query[:, :, :, h].to(dtype) * qk.scale).permute(0, 3, 1, 4, 2, 5).flatten(3, 4)
        yield _Heads(
            h,
            chosen,
            qk.prompt_key_BPkD[b, :, h].to(dtype).transpose(1, 2),
            qk.response_key_BGTkD[b, g, :, h].to(dtype).permute(0, 3, 1, 2, 4),
        )


def _weights(qk: RowQK, piece: tuple, heads: _Heads) -> Tensor:
    """Softmax attention [b, h, g, m, r, S]."""
    b, _, r = piece
    P, T, device = heads.prompt_key.shape[2], heads.response_key.shape[3], heads.query.device
    prompt = (heads.rows @ heads.prompt_key.mT).view(*heads.query.shape[:4], P)
    scores = torch.cat([prompt, heads.query @ heads.response_key.mT], dim=-1)
    del prompt
    scores = scores.unflatten(3, (qk.heads_per_key, -1))
    unseen = torch.arange(P, device=device) >= qk.prompt_lengths_B[b, None]
    scores[..., :P].masked_fill_(unseen[:, None, None, None, None], float("-inf"))
    later = torch.arange(T, device=device) > torch.arange(r.start, r.stop, device=device)[:, None] - qk.lag
    scores[..., P:].masked_fill_(later, float("-inf"))
    return torch.softmax(scores, dim=-1)


def kernels_for(device: torch.device, dtype: torch.dtype, width: int) -> tuple[bool, str]:
    """Whether rows of such tensors are formed by the Triton kernels, and what to say about it."""
    if device.type != "cuda":
        return False, f"PyTorch, as the device is {device.type}"
    if width > _KERNEL_WIDTH:
        return False, f"PyTorch, as heads are {width} wide and the kernels take at most {_KERNEL_WIDTH}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False, f"PyTorch, as the kernels do not take {dtype}"
    if importlib.util.find_spec("triton") is None:
        return False, "PyTorch, as triton is not installed (it comes with CUDA builds of torch)"
    return True, "Triton kernels"


@functools.cache
def chosen_path(device: torch.device, dtype: torch.dtype, width: int) -> tuple[bool, str]:
    """`kernels_for`, and kernels that agree with PyTorch on this device; one log line each time the answer is new."""
    kernels, why = kernels_for(device, dtype, width)
    if kernels:
        from megatron_ral.attention.backend_check import kernel_fault

        fault = kernel_fault(device, dtype, width)
        if fault:
            kernels, why = False, f"PyTorch, as the Triton kernels are at fault here: {fault}"
    level = logging.WARNING if device.type == "cuda" and not kernels else logging.INFO
    logger.log(level, "attention rows on %s: %s", device, why)
    return kernels, why


def _with_kernels(qk: RowQK, wanted: Optional[bool]) -> bool:
    query = qk.query_BGRnD
    return chosen_path(query.device, query.dtype, query.shape[4])[0] if wanted is None else wanted


@torch.no_grad()
def head_mean_attention(qk: RowQK, kernels: Optional[bool] = None) -> Tensor:
    """Attention of every row, summed over this rank's heads and divided by the heads of all ranks.

        out[b, g, r, j] = 1 / num_heads * sum_h softmax_j(scale * q[b, g, r, h] . k[b, g, j, h])

    Args:
        qk: rows and the keys they see.
        kernels: by the Triton kernels or by PyTorch; None: as `chosen_path` says.

    Returns:
        [B, G, R, S] float32 (float64 for float64 inputs) without gradient; the sum over tensor ranks has rows that sum
        to 1. Columns a row cannot see are exactly 0.
    """
    if _with_kernels(qk, kernels):
        from megatron_ral.attention.triton_backend import head_mean_rows

        return head_mean_rows(qk)
    B, G, R = qk.query_BGRnD.shape[:3]
    dtype = torch.promote_types(qk.query_BGRnD.dtype, torch.float32)
    result = torch.zeros(B, G, R, qk.num_keys, dtype=dtype, device=qk.query_BGRnD.device)
    for piece in _weight_pieces(qk):
        for heads in _heads(qk, piece):
            result[piece] += _weights(qk, piece, heads).sum(dim=(1, 3))
    return result.div_(qk.num_heads)


def chosen_keys(keys: RowKeys, piece: tuple = _ALL) -> Tensor:
    """bool [B, 1, 1, S] or [B, 1, R, S]: the keys that each row's policy is made of, visible or not."""
    b, _, r = piece
    chosen = keys.columns_BS[b, None, None]
    if keys.own_BR is None:
        return chosen
    own = keys.own_BR[b, None, r, None]
    return chosen & (torch.arange(chosen.shape[-1], device=own.device) != own)


def key_mass(attention_BGRS: Tensor, keys: RowKeys) -> Tensor:
    """Z [B, G, R] of `attention_policy`; no gradient.

    Always summed in the same boxes: the rounding of a sum can depend on the shape of what is summed, and rows that are
    equal bit for bit must have policies that are, in whichever pieces these are formed.
    """
    mass = torch.empty_like(attention_BGRS[..., 0])
    for piece in pieces(mass.shape, attention_BGRS.shape[3]):
        mass[piece] = (attention_BGRS[piece].detach() * chosen_keys(keys, piece)).sum(dim=-1)
    return mass


def attention_distribution(attention_BGRS: Tensor, keys: RowKeys) -> tuple[Tensor, Tensor]:
    """Attention policy of eq. (2): head-averaged attention over the chosen keys, renormalised.

        p[i] = a[i] / Z,   Z = sum of a over the chosen keys

    Heads are averaged first and the average is renormalised; the other order is another distribution.

    Args:
        attention_BGRS: head-averaged attention.
        keys: what the policy is made of.

    Returns:
        (p of the same shape, Z without the last dimension); a row without mass on its keys gives p = 0, Z = 0. No
        gradient.

    Source: RAL paper (arXiv 2602.04884) eq. (2).
    """
    mass = key_mass(attention_BGRS, keys)
    return distribution_part(attention_BGRS, mass, keys), mass


def distribution_part(attention_BGRS: Tensor, mass_BGR: Tensor, keys: RowKeys, piece: tuple = _ALL) -> Tensor:
    """p of the rows that the slices `piece` (b, g, r) name; the other arguments are of the whole batch."""
    policy, mass = attention_BGRS[piece].detach() * chosen_keys(keys, piece), mass_BGR[piece]
    return policy.div_(torch.where(mass > 0, mass, torch.inf)[..., None])


def _compared(mass: Tensor, target: Tensor) -> Tensor:
    """bool: rows that have a policy and a target."""
    return (mass > 0) & (target.sum(dim=-1) > 0)


def _box_for_kernels(elements: int) -> int:
    """Elements that formulas of a row take at once beside kernels: few launches, and several temporaries that are small
    beside the map."""
    return max(_LARGE_PIECE, elements // 16)


class _RowDivergence(torch.autograd.Function):
    """Divergence of every row's policy from its target; gradient to queries and keys in closed form.

    With a_h the weights of head h, a their mean, p = a / Z over the chosen keys, and s = dD/dp:

        D_i       = (s_i - sum_j p_j s_j) / Z     for chosen keys, else 0            (= dD/da_i)
        dD/de_h,i = a_h,i / num_heads * (D_i - sum_j a_h,j D_j)                      (scores e of head h)
        dD/dq_h   = scale * sum_i dD/de_h,i k_i,    dD/dk_i = scale * sum_h,rows dD/de_h,i q_h
    """

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        prompt_key: Tensor,
        response_key: Tensor,
        attention: Tensor,
        target: Tensor,
        keys: RowKeys,
        kind: str,
        qk: RowQK,
        kernels: bool,
    ) -> Tensor:
        mass = key_mass(attention, keys)
        ctx.save_for_backward(query, prompt_key, response_key, attention, target, mass)
        ctx.keys, ctx.kind, ctx.rest, ctx.kernels = keys, kind, tuple(qk)[3:], kernels
        result = torch.empty(attention.shape[:3], dtype=attention.dtype, device=attention.device)
        size = _box_for_kernels(attention.numel()) if kernels else None
        for piece in pieces(attention.shape[:3], attention.shape[3], size):
            value = DIVERGENCES[kind].value(distribution_part(attention, mass, keys, piece), target[piece])
            result[piece] = torch.where(_compared(mass[piece], target[piece]), value, 0.0)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        query, prompt_key, response_key, attention, target, mass = ctx.saved_tensors
        qk = RowQK(query, prompt_key, response_key, *ctx.rest)
        dtype = torch.promote_types(query.dtype, torch.float32)
        grads = tuple(torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) for tensor in qk[:3])
        slope_of = functools.partial(
            _RowDivergence._reaching, attention, mass, target, ctx.keys, ctx.kind, grad / qk.num_heads
        )
        (_RowDivergence._by_kernels if ctx.kernels else _RowDivergence._by_pieces)(qk, slope_of, grads)
        return *(part.to(tensor.dtype) for part, tensor in zip(grads, qk[:3])), None, None, None, None, None, None

    @staticmethod
    def _by_pieces(qk: RowQK, slope_of: Callable[[tuple], Tensor], grads: tuple[Tensor, ...]) -> None:
        """Add to the gradients of query, prompt and response keys; `slope_of`: `_reaching` of a piece."""
        grad_query, grad_prompt, grad_response = grads
        P = qk.prompt_key_BPkD.shape[1]
        for piece in _weight_pieces(qk):
            b, g, r = piece
            slope = slope_of(piece)[:, None, :, None]  # [b, 1, g, 1, r, S]
            for heads in _heads(qk, piece):
                weights = _weights(qk, piece, heads)
                inner = (weights * slope).sum(dim=-1, keepdim=True)
                scores = weights.mul_(slope - inner).flatten(3, 4)  # [b, h, g, m r, S]
                prompt, own, h = scores[..., :P], scores[..., P:], heads.index
                to_query = (prompt.flatten(2, 3) @ heads.prompt_key).view_as(heads.query)
                to_query = to_query.add_(own @ heads.response_key).mul_(qk.scale)
                to_query = to_query.unflatten(3, (qk.heads_per_key, -1)).permute(0, 2, 4, 1, 3, 5)
                grad_query[piece].unflatten(3, (-1, qk.heads_per_key))[:, :, :, h] = to_query
                # heads.query carries the scale already
                for part, matrices, rows in zip(grad_prompt[b, :, h], prompt.flatten(2, 3), heads.rows):
                    for head, (matrix, vectors) in enumerate(zip(matrices, rows)):
                        part[:, head].addmm_(matrix.mT, vectors)
                grad_response[b, g, :, h] += (own.mT @ heads.query).permute(0, 2, 3, 1, 4)

    @staticmethod
    def _by_kernels(qk: RowQK, slope_of: Callable[[tuple], Tensor], grads: tuple[Tensor, ...]) -> None:
        """The same by the Triton kernels, for which the slope is written down: at most `_KERNEL_PIECE` elements."""
        from megatron_ral.attention.triton_backend import add_gradients

        S = qk.num_keys
        for piece in pieces(qk.query_BGRnD.shape[:3], S, _KERNEL_PIECE):
            shape, starts = [part.stop - part.start for part in piece], [part.start for part in piece]
            slope = torch.empty(*shape, S, dtype=torch.float32, device=qk.query_BGRnD.device)
            for box in pieces(shape, S, _box_for_kernels(slope.numel())):
                slope[box] = slope_of(
                    tuple(slice(part.start + start, part.stop + start) for part, start in zip(box, starts))
                )
            add_gradients(qk, slope, piece, grads)

    @staticmethod
    def _reaching(
        attention: Tensor, mass: Tensor, target: Tensor, keys: RowKeys, kind: str, grad: Tensor, piece: tuple
    ) -> Tensor:
        """Slope of a piece times `grad` [B, G, R], which reaches the rows."""
        return _RowDivergence._slope(attention, mass, target[piece], keys, kind, piece).mul_(grad[piece][..., None])

    @staticmethod
    def _slope(attention: Tensor, mass: Tensor, target: Tensor, keys: RowKeys, kind: str, piece: tuple) -> Tensor:
        """dD/da of a piece, [b, g, r, S]; `target` is that of the piece."""
        policy, mass = distribution_part(attention, mass, keys, piece), mass[piece]
        slope = DIVERGENCES[kind].slope(policy, target)
        slope = slope - (policy * slope).sum(dim=-1, keepdim=True)
        # Rows and keys of next to no mass (1e-30) would overflow; held there, their gradient only gets smaller.
        least, bound = torch.finfo(slope.dtype).tiny * 2**26, torch.finfo(slope.dtype).max / 2**10
        slope /= torch.where(_compared(mass, target), mass.clamp(min=least), torch.inf)[..., None]
        return slope.clamp_(-bound, bound).mul_(chosen_keys(keys, piece))


def row_divergence(
    qk: RowQK,
    attention_BGRS: Tensor,
    target_BGRS: Tensor,
    keys: RowKeys,
    kind: str = "jsd",
    kernels: Optional[bool] = None,
) -> Tensor:
    """Divergence of every row's attention policy from its target, with gradient to the queries and keys of `qk`.

    Args:
        qk: rows; gradient flows to its queries and keys.
        attention_BGRS: `head_mean_attention` of these rows, summed over tensor ranks.
        target_BGRS: distributions over the same keys (`attention_policy` of another pass); constant. May be expanded
            from fewer rows.
        keys: what the policy is made of.
        kind: a name of `divergence.DIVERGENCES`.
        kernels: as for `head_mean_attention`.

    Returns:
        [B, G, R] in nats, >= 0; 0 with zero gradient for rows without mass on their keys and for rows without a target
        (all zeros).

    Source: RAL paper eq. (3); closed form derived in this project and checked against autograd.
    """
    shape = attention_BGRS.shape
    return _RowDivergence.apply(
        *qk[:3], attention_BGRS.detach(), target_BGRS.detach().expand(shape), keys, kind, qk, _with_kernels(qk, kernels)
    )
