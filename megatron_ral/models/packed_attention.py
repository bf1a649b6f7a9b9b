"""Attention inside segments of packed rows, for the vision towers of transformers: one call for all segments.

A segment is a window, or a frame (a picture, or one temporal patch of a video). The rows of all segments stand one
after the other, and a row reads its own segment alone. transformers calls its attention function once per segment,
which is 156 calls per block for a picture of 2,300 tokens. Here a tower is told of one segment that holds all rows, so
that transformers calls the function once. The true segments arrive by a keyword argument, which a tower passes on.

- On CUDA in 16 bits, flash attention for variable lengths reads the segments as they are (torch.nn.attention.varlen).
- Elsewhere segments are padded to a batch for scaled_dot_product_attention, with a mask over keys.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Mapping, Optional, Sequence, cast

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

ATTENTION_NAME = "packed_segments"
"""Name of the function in transformers. A name with "flash" in it would make transformers import a package."""


@dataclass(frozen=True)
class Bucket:
    """Segments that are padded to the longest of them."""

    rows: Tensor
    """Rows of each segment, [N, L] int64. Padding repeats the first row."""
    mask: Optional[Tensor]
    """Mask of the real keys, [N, 1, 1, L] bool. None: all segments have L rows."""


@dataclass(frozen=True)
class Segments:
    """Consecutive segments that together hold all T rows, on the device of the rows.

    Flash attention reads `bounds` and `longest`, the padded path `buckets` and `places`.
    """

    longest: int
    """Rows of the longest segment."""
    bounds: Optional[Tensor] = None
    """First row of each segment, and T, [N + 1] int32."""
    buckets: tuple[Bucket, ...] = ()
    """Buckets of segments, one call each. Empty: all segments are equally long, so that the rows are a batch."""
    places: Optional[Tensor] = None
    """Place of each row in the padded buckets, one after the other, [T] int64."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, flash: bool) -> "Segments":
        """Return segments by their lengths, which are known on the host: nothing is read from the device.

        Args:
            lengths: Rows of each segment, at least 1.
            device: Device of the rows.
            flash: True for flash attention, see `uses_flash`.
        """
        longest = max(lengths)
        ends = torch.tensor(lengths).cumsum(0)
        if flash:
            return cls(longest, bounds=upload(torch.nn.functional.pad(ends, (1, 0)).int(), device))
        if longest == min(lengths):
            return cls(longest)
        starts, sizes = ends - torch.tensor(lengths), torch.tensor(lengths)
        places, buckets, first = torch.empty(sum(lengths), dtype=torch.int64), [], 0
        for chosen in map(torch.tensor, _buckets(lengths)):
            width = int(sizes[chosen[0]])
            steps = torch.arange(width)
            is_real = steps < sizes[chosen, None]
            rows = starts[chosen, None] + steps.where(is_real, torch.zeros_like(steps))
            places[rows[is_real]] = first + is_real.flatten().nonzero()[:, 0]
            first += rows.numel()
            mask = None if bool(is_real.all()) else upload(is_real[:, None, None], device)
            buckets.append(Bucket(upload(rows, device), mask))
        return cls(longest, buckets=tuple(buckets), places=upload(places, device))


def _buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Return few buckets of segments, the longest first, whose scores padding makes at most a quarter more."""
    buckets: list[list[int]] = []
    scores = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        scores += lengths[index] ** 2
        if buckets and (len(buckets[-1]) + 1) * lengths[buckets[-1][0]] ** 2 <= 1.25 * scores:
            buckets[-1].append(index)
        else:
            buckets.append([index])
            scores = lengths[index] ** 2
    return buckets


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of host memory on the device. The host does not wait for the copy to a GPU."""
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def uses_flash(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Return whether flash attention computes rows of this kind: 16 bits on compute capability 8.0 or later."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and is_half and head_width % 8 == 0 and _capability(device) >= (8, 0)


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Optional[Tensor] = None,
    scaling: Optional[float] = None,
    segments: Optional[Mapping[str, Segments]] = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Return attention inside segments, as transformers calls an attention function. The result carries gradient.

    Args:
        module: Attention of one block. Its attribute `segments` names the segments that it reads (default: "frames").
        query: [1, heads, T, width].
        key: Like `query`.
        value: Like `query`.
        attention_mask: Not used. Vision towers give none.
        scaling: Factor of the scores. None: width ** -0.5.
        segments: Segments by name. None: the rows are one segment.
        unused: Other arguments of transformers. Vision towers have no dropout.

    Returns:
        [1, T, heads, width], and None in place of weights.
    """
    if segments is None:
        return scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None
    own = segments[getattr(module, "segments", "frames")]
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    if own.bounds is not None:
        bounds, longest = own.bounds, own.longest
        result = cast(Tensor, varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling))
    elif own.places is None:
        result = _attend([part.unflatten(0, (-1, own.longest)) for part in (query, key, value)], None, scaling)
    else:
        padded = [
            _attend([_take(part, bucket.rows) for part in (query, key, value)], bucket.mask, scaling)
            for bucket in own.buckets
        ]
        result = torch.cat(padded).index_select(0, own.places)
    return result[None], None


def _take(part: Tensor, rows: Tensor) -> Tensor:
    """Return part[rows], whose gradient index_select forms faster than indexing does."""
    return part.index_select(0, rows.flatten()).unflatten(0, rows.shape)


def _attend(parts: Sequence[Tensor], mask: Optional[Tensor], scaling: Optional[float]) -> Tensor:
    """Return attention of query, key and value [N, L, heads, width] as rows [N L, heads, width]."""
    query, key, value = (part.transpose(1, 2) for part in parts)
    result = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return result.transpose(1, 2).flatten(0, 1)


def register() -> str:
    """Make the function known to transformers. Return its name there."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, packed_attention)
    return ATTENTION_NAME
