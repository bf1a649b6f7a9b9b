"""Attention of responses to the prompt that they share and to themselves: two fused calls, joined by their normalisers.

One call for both would need a dense mask and a copy of the prompt's keys for every response. Here all rows of a group
meet the prompt's keys in one call without a causal mask, and each response meets its own keys in a causal one. A fused
kernel returns the log of the sum of its softmax beside its output, so that

    lse = log sum_i exp(lse_i),   out = sum_i exp(lse_i - lse) out_i

over both parts i. The gradient of a part is the kernel's own backward pass, given the joined `out` and `lse`, because
the weights exp(score - lse) and the row sums of grad * out are those of the whole. (Published for keys that are spread
over devices: Ring Attention, arXiv 2310.01889.)

On CUDA the kernel is torch's flash attention for sequences of any lengths, in 16 bits. On the CPU it is torch's flash
attention for the CPU, in any precision.
"""

import math
from dataclasses import dataclass
from typing import Any, Optional, Protocol

import torch
from torch import Tensor

from megatron_ral.attention.group_layout import GroupLayout


@dataclass(frozen=True)
class KeyPart:
    """Which keys the rows of one call see. Keys are [X, S, k, D] for rows [X, L, n, D]."""

    is_causal: bool
    """True: row l sees keys 0 to l. False: all rows see all keys of their entry."""
    lengths: Optional[Tensor] = None
    """[X] int64 numbers of keys that are no padding. None: all."""
    num_keys: int = 0
    """Sum of `lengths`, known to the host."""


class Kernel(Protocol):
    """Fused attention that returns its normaliser."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, part: KeyPart, scale: float) -> tuple[Tensor, Tensor]:
        """Return outputs [X, L, n, D] and the log of the sum of the softmax, [X, L, n] float32 or wider."""
        ...

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        part: KeyPart,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value for the given outputs and normalisers."""
        ...


class FlashKernel:
    """Flash attention on CUDA: bfloat16 or float16, heads of at most 256 whose width divides by 8."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, part: KeyPart, scale: float) -> tuple[Tensor, Tensor]:
        X, L, n, _ = query.shape
        packed = _Packed.of(query, key, part)
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            query.flatten(0, 1), packed.pack(key), packed.pack(value), *packed.sequences, 0.0, part.is_causal, False,
            scale=scale,
        )  # fmt: skip
        return output.view(X, L, n, -1), lse.t().reshape(X, L, n)

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        part: KeyPart,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        packed = _Packed.of(query, key, part)
        random = torch.empty(2, dtype=torch.uint64, device=query.device)  # of dropout, which there is none of
        unused = torch.empty((), dtype=torch.uint64, device=query.device)
        to_query, to_key, to_value = torch.ops.aten._flash_attention_backward(
            grad.flatten(0, 1), query.flatten(0, 1), packed.pack(key), packed.pack(value), output.flatten(0, 1),
            lse.flatten(0, 1).t().contiguous(), *packed.sequences, 0.0, part.is_causal, random, unused, scale=scale,
        )  # fmt: skip
        return to_query.view_as(query), packed.unpack(to_key, key), packed.unpack(to_value, value)


@dataclass(frozen=True)
class _Packed:
    """Sequences of one call behind each other, without the padding of the keys."""

    sequences: tuple[Tensor, Tensor, int, int]
    """Starts of queries and keys, [X + 1] int32, and their largest lengths."""
    places: Optional[Tensor]
    """Places of the keys in [X S], [sum of lengths] int64. None: all of them, in order."""

    @classmethod
    def of(cls, query: Tensor, key: Tensor, part: KeyPart) -> "_Packed":
        X, L, S, device = *query.shape[:2], key.shape[1], query.device
        starts = torch.arange(0, X * L + 1, L, dtype=torch.int32, device=device)
        if part.lengths is None:
            of_keys = starts if L == S else torch.arange(0, X * S + 1, S, dtype=torch.int32, device=device)
            return cls((starts, of_keys, L, S), None)
        ends = part.lengths.cumsum(0)
        rank = torch.arange(part.num_keys, device=device)
        entry = torch.searchsorted(ends, rank, right=True)
        places = rank + entry * S - (ends - part.lengths)[entry]
        return cls((starts, torch.nn.functional.pad(ends, (1, 0)).int(), L, S), places)

    def pack(self, keys: Tensor) -> Tensor:
        """Return keys [X, S, k, D] as [sum of lengths, k, D]."""
        flat = keys.flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)

    def unpack(self, gradient: Tensor, keys: Tensor) -> Tensor:
        """Return the gradient of packed keys in the shape of `keys`; 0 at padding."""
        if self.places is None:
            return gradient.view_as(keys)
        return gradient.new_zeros(keys.flatten(0, 1).shape).index_copy_(0, self.places, gradient).view_as(keys)


class CpuKernel:
    """Flash attention on the CPU."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, part: KeyPart, scale: float) -> tuple[Tensor, Tensor]:
        (rows, keys, values), mask = _for_cpu(query, key, value, part), _padding(key, part, query.dtype)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, keys, values, 0.0, part.is_causal, attn_mask=mask, scale=scale
        )
        return _rows_back(output, query), _rows_back(lse[..., None], query)[..., 0]

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        part: KeyPart,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        (rows, keys, values), mask = _for_cpu(query, key, value, part), _padding(key, part, query.dtype)
        grad, output, lse = (_rows_like(tensor, key, part) for tensor in (grad, output, lse[..., None]))
        to_rows, to_keys, to_values = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, rows, keys, values, output, lse[..., 0], 0.0, part.is_causal, attn_mask=mask, scale=scale
        )
        return _rows_back(to_rows, query), _keys_back(to_keys, key), _keys_back(to_values, value)


def _padding(key: Tensor, part: KeyPart, dtype: torch.dtype) -> Optional[Tensor]:
    """Return [X, 1, 1, S], -inf at padding and 0 elsewhere. None: no key is padding."""
    if part.lengths is None:
        return None
    hidden = torch.arange(key.shape[1], device=key.device) >= part.lengths[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=key.device).masked_fill_(hidden, -math.inf)[:, None, None]


def _rows_like(rows: Tensor, key: Tensor, part: KeyPart) -> Tensor:
    """Return rows [X, L, n, E] as [X, n, L, E] beside causal keys, else as [X, k, m L, E], so that no key is copied."""
    if part.is_causal:
        return rows.transpose(1, 2)
    return rows.unflatten(2, (key.shape[2], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _for_cpu(query: Tensor, key: Tensor, value: Tensor, part: KeyPart) -> tuple[Tensor, Tensor, Tensor]:
    rows = _rows_like(query, key, part)
    repeats = rows.shape[1] // key.shape[2]
    keys, values = (tensor.transpose(1, 2) for tensor in (key, value))
    if repeats > 1:
        keys, values = (tensor.repeat_interleave(repeats, dim=1) for tensor in (keys, values))
    return rows, keys, values


def _rows_back(rows: Tensor, query: Tensor) -> Tensor:
    """Return [X, L, n, E] of rows in either form of `_rows_like`."""
    _, L, n, _ = query.shape
    if rows.shape[2] == L and rows.shape[1] == n:
        return rows.transpose(1, 2)
    return rows.unflatten(2, (-1, L)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _keys_back(gradient: Tensor, key: Tensor) -> Tensor:
    """Return the gradient of keys [X, S, k, D], of heads that may have been repeated."""
    k = key.shape[2]
    gradient = gradient if gradient.shape[1] == k else gradient.unflatten(1, (k, -1)).sum(dim=2)
    return gradient.transpose(1, 2)


class _SharedPromptAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, prompt_key, prompt_value, own_key, own_value, prompt, own, scale, kernel):
        B, G, R, n, _ = query.shape
        whole, single = query.reshape(B, G * R, n, -1), query.reshape(B * G, R, n, -1)
        keys, values = own_key.flatten(0, 1), own_value.flatten(0, 1)
        over_prompt, prompt_lse = kernel.forward(whole, prompt_key, prompt_value, prompt, scale)
        over_own, own_lse = kernel.forward(single, keys, values, own, scale)
        own_lse = own_lse.reshape(prompt_lse.shape)
        lse = torch.logaddexp(prompt_lse, own_lse)
        share = (own_lse - lse).exp_()[..., None]
        output = torch.lerp(over_prompt.to(share.dtype), over_own.reshape(whole.shape).to(share.dtype), share)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, prompt_key, prompt_value, own_key, own_value, output, lse)
        ctx.parts = prompt, own, scale, kernel
        return output.view(query.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        query, prompt_key, prompt_value, own_key, own_value, output, lse = ctx.saved_tensors
        prompt, own, scale, kernel = ctx.parts
        B, G, R, n, _ = query.shape

        def whole(tensor: Tensor) -> Tensor:
            return tensor.reshape(B, G * R, n, -1)

        def single(tensor: Tensor) -> Tensor:
            return tensor.reshape(B * G, R, n, -1)

        keys, values = own_key.flatten(0, 1), own_value.flatten(0, 1)
        to_query, to_prompt_key, to_prompt_value = kernel.backward(
            whole(grads[0]), whole(query), prompt_key, prompt_value, output, lse, prompt, scale
        )
        again, to_own_key, to_own_value = kernel.backward(
            single(grads[0]), single(query), keys, values, single(output), single(lse)[..., 0], own, scale
        )
        to_query = to_query.reshape(query.shape) + again.reshape(query.shape)
        to_own = (gradient.unflatten(0, (B, G)) for gradient in (to_own_key, to_own_value))
        return to_query, to_prompt_key, to_prompt_value, *to_own, None, None, None, None


def shared_prompt_attention(
    query_BGRnD: Tensor,
    prompt_key_BPkD: Tensor,
    prompt_value_BPkD: Tensor,
    own_key_BGRkD: Tensor,
    own_value_BGRkD: Tensor,
    layout: GroupLayout,
    scale: float,
    kernel: Kernel,
) -> Tensor:
    """Return the attention of every response row over the prompt and its own response, [B, G, R, n, D].

    Args:
        query_BGRnD: Queries of the response rows.
        prompt_key_BPkD: Keys of the prompts, which all responses of a group share.
        prompt_value_BPkD: Values of the prompts.
        own_key_BGRkD: Keys of the responses.
        own_value_BGRkD: Values of the responses.
        layout: Lengths. Padding of a prompt is not seen.
        scale: Softmax scale.
        kernel: Fused attention of the device.

    Returns:
        Outputs that carry gradient to all five tensors.
    """
    prompt = KeyPart(False)
    if layout.num_prompt_tokens != layout.B * layout.P:
        prompt = KeyPart(False, layout.prompt_lengths, layout.num_prompt_tokens)
    tensors = query_BGRnD, prompt_key_BPkD, prompt_value_BPkD, own_key_BGRkD, own_value_BGRkD
    return _SharedPromptAttention.apply(*tensors, prompt, KeyPart(True), scale, kernel)


LEAST_KEYS_ON_CPU = 256
"""Prompt tokens from which two calls take less time than a dense mask on the CPU (0.7 to 0.9 of it at 300 to 1,100; 1.2
to 1.9 at 30 to 90)."""


def kernel_for(query: Tensor, prompt_length: int) -> Optional[Kernel]:
    """Return the fused attention for such queries [..., D] beside prompts of a padded length.

    Returns:
        The kernel. None: there is none that returns its normaliser, or a dense mask is faster.
    """
    if query.device.type == "cpu":
        return CpuKernel() if prompt_length >= LEAST_KEYS_ON_CPU else None
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    width = query.shape[-1]
    return FlashKernel() if query.is_cuda and is_half and width % 8 == 0 and width <= 256 else None
