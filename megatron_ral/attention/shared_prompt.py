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
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Optional, Protocol

import torch
from torch import Tensor

from megatron_ral.attention.group_layout import GroupLayout, PackedGroups


class GroupTensors(NamedTuple):
    """Queries of the response rows, and the keys and values that they see."""

    query_NnD: Tensor
    """Queries of all response tokens without padding, in the order of groups."""
    prompt_key_BPkD: Tensor
    """Keys of the prompts, which all responses of a group share."""
    prompt_value_BPkD: Tensor
    own_key_BGRkD: Tensor
    """Keys of the responses."""
    own_value_BGRkD: Tensor


@dataclass(frozen=True)
class Call:
    """Inputs of one call of a kernel."""

    query: Tensor
    """[X, L, n, D]."""
    key: Tensor
    """[X, S, k, D]."""
    value: Tensor
    """[X, S, k, D]."""
    scale: float
    """Softmax scale."""
    is_causal: bool
    """True: row l sees keys 0 to l. False: all rows see all keys of their entry."""
    lengths: Optional[Tensor] = None
    """[X] int64 numbers of keys that are no padding. None: all."""
    num_keys: int = 0
    """Sum of `lengths`, known to the host."""


class Kernel(Protocol):
    """Fused attention that returns its normaliser."""

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """Return outputs [X, L, n, D] and the log of the sum of the softmax, [X, L, n] float32 or wider."""
        ...

    def backward(self, call: Call, output: Tensor, lse: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value for the given outputs, normalisers and gradient of outputs."""
        ...


class FlashKernel:
    """Flash attention on CUDA: bfloat16 or float16, heads of at most 256 whose width divides by 8."""

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        X, L, n, _ = call.query.shape
        packed = _Packed.of(call)
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            call.query.flatten(0, 1), packed.pack(call.key), packed.pack(call.value), *packed.sequences, 0.0,
            call.is_causal, False, scale=call.scale,
        )  # fmt: skip
        return output.view(X, L, n, -1), lse.t().reshape(X, L, n)

    def backward(self, call: Call, output: Tensor, lse: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed, device = _Packed.of(call), call.query.device
        random = torch.empty(2, dtype=torch.uint64, device=device)  # of dropout, which there is none of
        unused = torch.empty((), dtype=torch.uint64, device=device)
        to_query, to_key, to_value = torch.ops.aten._flash_attention_backward(
            grad.flatten(0, 1), call.query.flatten(0, 1), packed.pack(call.key), packed.pack(call.value),
            output.flatten(0, 1), lse.flatten(0, 1).t().contiguous(), *packed.sequences, 0.0, call.is_causal, random,
            unused, scale=call.scale,
        )  # fmt: skip
        return to_query.view_as(call.query), packed.unpack(to_key, call.key), packed.unpack(to_value, call.value)


@dataclass(frozen=True)
class _Packed:
    """Sequences of one call behind each other, without the padding of the keys."""

    sequences: tuple[Tensor, Tensor, int, int]
    """Starts of queries and keys, [X + 1] int32, and their largest lengths."""
    places: Optional[Tensor]
    """Places of the keys in [X S], [sum of lengths] int64. None: all of them, in order."""

    @classmethod
    def of(cls, call: Call) -> "_Packed":
        X, L, S, device = *call.query.shape[:2], call.key.shape[1], call.query.device
        starts = torch.arange(0, X * L + 1, L, dtype=torch.int32, device=device)
        if call.lengths is None:
            of_keys = starts if L == S else torch.arange(0, X * S + 1, S, dtype=torch.int32, device=device)
            return cls((starts, of_keys, L, S), None)
        ends = call.lengths.cumsum(0)
        rank = torch.arange(call.num_keys, device=device)
        entry = torch.searchsorted(ends, rank, right=True)
        places = rank + entry * S - (ends - call.lengths)[entry]
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

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_inputs(call), 0.0, call.is_causal, attn_mask=_padding(call), scale=call.scale
        )
        return _rows_back(output, call), _rows_back(lse[..., None], call)[..., 0]

    def backward(self, call: Call, output: Tensor, lse: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad, output, lse = (_rows_like(tensor, call) for tensor in (grad, output, lse[..., None]))
        to_rows, to_keys, to_values = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *_inputs(call), output, lse[..., 0], 0.0, call.is_causal, attn_mask=_padding(call), scale=call.scale
        )
        return _rows_back(to_rows, call), _keys_back(to_keys, call), _keys_back(to_values, call)


def _padding(call: Call) -> Optional[Tensor]:
    """Return [X, 1, 1, S], -inf at padding and 0 elsewhere. None: no key is padding."""
    if call.lengths is None:
        return None
    hidden = torch.arange(call.key.shape[1], device=call.key.device) >= call.lengths[:, None]
    mask = torch.zeros(hidden.shape, dtype=call.query.dtype, device=call.key.device)
    return mask.masked_fill_(hidden, -math.inf)[:, None, None]


def _rows_like(rows: Tensor, call: Call) -> Tensor:
    """Return rows [X, L, n, E] as [X, n, L, E] beside causal keys, else as [X, k, m L, E], so that no key is copied."""
    if call.is_causal:
        return rows.transpose(1, 2)
    return rows.unflatten(2, (call.key.shape[2], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _inputs(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values with as many heads of each, in front of their rows."""
    rows = _rows_like(call.query, call)
    repeats = rows.shape[1] // call.key.shape[2]
    keys, values = (tensor.transpose(1, 2) for tensor in (call.key, call.value))
    if repeats > 1:
        keys, values = (tensor.repeat_interleave(repeats, dim=1) for tensor in (keys, values))
    return rows, keys, values


def _rows_back(rows: Tensor, call: Call) -> Tensor:
    """Invert `_rows_like`."""
    if call.is_causal:
        return rows.transpose(1, 2)
    return rows.unflatten(2, (-1, call.query.shape[1])).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _keys_back(gradient: Tensor, call: Call) -> Tensor:
    """Return the gradient of keys [X, S, k, D], of heads that may have been repeated."""
    k = call.key.shape[2]
    gradient = gradient if gradient.shape[1] == k else gradient.unflatten(1, (k, -1)).sum(dim=2)
    return gradient.transpose(1, 2)


def _calls(group: GroupTensors, layout: GroupLayout, scale: float) -> tuple[Call, Call]:
    """Return the calls over the prompt and over the own response."""
    query, prompt_key, prompt_value, own_key, own_value = group
    packed = _packed(layout)
    prompt = Call(packed.rows.pad(query), prompt_key, prompt_value, scale, False)
    if packed.prompts.places is not None:
        prompt = replace(prompt, lengths=layout.prompt_lengths, num_keys=packed.prompts.num_tokens)
    return prompt, Call(_single(packed, query), own_key.flatten(0, 1), own_value.flatten(0, 1), scale, True)


def _packed(layout: GroupLayout) -> PackedGroups:
    assert layout.packed is not None, "there are responses"
    return layout.packed


def _single(packed: PackedGroups, rows: Tensor) -> Tensor:
    """Return rows [N, ...] as [B G, R, ...], each of which sees its own response."""
    return packed.responses.pad(rows).flatten(0, 1)


def _pack_single(packed: PackedGroups, rows: Tensor) -> Tensor:
    """Invert `_single`."""
    return packed.responses.pack(rows.unflatten(0, packed.responses.shape[:2]))


class _SharedPromptAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, layout, scale, kernel = inputs
        group, packed = GroupTensors(*tensors), _packed(layout)
        over_prompt, over_own = map(kernel.forward, _calls(group, layout, scale))
        prompt, prompt_lse = (packed.rows.pack(part) for part in over_prompt)
        own, own_lse = (_pack_single(packed, part) for part in over_own)
        lse = torch.logaddexp(prompt_lse, own_lse)
        share = (own_lse - lse).exp_()[..., None]
        prompt, own = prompt.to(share.dtype), own.to(share.dtype)
        output = torch.lerp(prompt, own, share).to(group.query_NnD.dtype)
        ctx.save_for_backward(*group, output, lse)
        ctx.rest = layout, scale, kernel
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        *tensors, output, lse = ctx.saved_tensors
        layout, scale, kernel = ctx.rest
        packed = _packed(layout)
        prompt, own = _calls(GroupTensors(*tensors), layout, scale)
        rows = output, lse, grads[0]
        # Padding has output, normaliser and gradient 0, so that it adds nothing to the gradient of keys and values.
        to_query, *to_prompt = kernel.backward(prompt, *map(packed.rows.pad, rows))
        again, *to_own = kernel.backward(own, *(_single(packed, part) for part in rows))
        to_query = packed.rows.pack(to_query) + _pack_single(packed, again)
        to_own = (gradient.unflatten(0, packed.responses.shape[:2]) for gradient in to_own)
        return to_query, *to_prompt, *to_own, None, None, None


def shared_prompt_attention(group: GroupTensors, layout: GroupLayout, scale: float, kernel: Kernel) -> Tensor:
    """Return the attention of every response token over the prompt and its own response, [N, n, D].

    Args:
        group: Queries, keys and values, all of which get gradient.
        layout: Lengths. Padding of a prompt is not seen.
        scale: Softmax scale.
        kernel: Fused attention of the device.
    """
    return _SharedPromptAttention.apply(*group, layout, scale, kernel)


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
