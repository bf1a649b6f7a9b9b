"""Pictures and videos through the vision tower, in calls of bounded size.

A tower reads frames: a picture is one frame or several (tiles), a video has one per temporal patch. Frames do not see
each other, neither in attention nor in positions. A sequence of frames may therefore be cut between any two of them,
and frames of one size that follow each other may stand as one video, whatever they belong to. Features are the same.

All that a tower derives from sizes is computed on the host, so that no block waits for the device.
"""

from dataclasses import replace
from itertools import groupby
from typing import Any, Iterator, NamedTuple, Sequence, cast

import torch
from torch import Tensor

from megatron_ral.models.families import Family
from megatron_ral.models.packed_attention import Segments, upload, uses_flash
from megatron_ral.types import Patches

PATCHES_PER_CALL = 32_768
"""Largest number of patches that a call of the tower reads, unless a single frame has more."""


class Frame(NamedTuple):
    """Size of one frame in patches."""

    height: int
    width: int

    @property
    def patches(self) -> int:
        """Number of patches."""
        return self.height * self.width


def frames_of(grids: Tensor) -> list[Frame]:
    """Return the frames of pictures and videos in order.

    Args:
        grids: Patches along time, height and width, [V, 3] int64 in host memory.
    """
    return [Frame(height, width) for time, height, width in grids.tolist() for _ in range(time)]


def share(frames: Sequence[Frame], parts: int) -> list[list[Frame]]:
    """Cut frames into `parts` consecutive shares of about as many patches each. A share may be empty."""
    total, before = sum(frame.patches for frame in frames), 0
    shares: list[list[Frame]] = [[] for _ in range(parts)]
    for frame in frames:
        middle = before + frame.patches / 2
        shares[int(middle * parts / total)].append(frame)
        before += frame.patches
    return shares


def calls(frames: Sequence[Frame], limit: int) -> Iterator[list[Frame]]:
    """Cut frames into consecutive calls of at most `limit` patches. A larger frame has a call of its own."""
    call: list[Frame] = []
    patches = 0
    for frame in frames:
        if call and patches + frame.patches > limit:
            yield call
            call, patches = [], 0
        call.append(frame)
        patches += frame.patches
    if call:
        yield call


def encode_frames(
    tower: torch.nn.Module, family: Family, frames: Sequence[Frame], patches: Sequence[Patches], first: int = 0
) -> Tensor:
    """Return the features of consecutive frames. They carry gradient to the tower.

    Without frames the tower reads a small blank one, whose result is unused. A trained tower then has zero gradients,
    where a data-parallel rank without pictures would otherwise have none.

    Args:
        tower: Vision tower of transformers, built by `Family.build_tower`.
        family: Family of the model.
        frames: Frames to encode.
        patches: Patches of all frames in order, in host memory. Each may hold any number of frames.
        first: Row of `patches`, counted over all of them, at which `frames` begin.

    Returns:
        [visual tokens, 1 + D, H]: replacements of the word embeddings, then the features of D layers (DeepStack).
    """
    if not frames:
        frame, rules = Frame(*family.blank_frame(tower)), family.patch_rules(cast(Any, tower).config)
        pixels = torch.zeros(frame.patches, rules.temporal_patch_size, rules.patch_size**2, rules.channels)
        features = _call(tower, family, [frame], [Patches(pixels.byte(), torch.zeros(rules.channels, 256))])
        return features[:0] + 0.0 * features.sum()
    parts = []
    for call in calls(frames, PATCHES_PER_CALL):
        stop = first + sum(frame.patches for frame in call)
        parts.append(_call(tower, family, call, list(_rows(patches, first, stop))))
        first = stop
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _call(tower: torch.nn.Module, family: Family, frames: Sequence[Frame], patches: Sequence[Patches]) -> Tensor:
    parameter = next(tower.parameters())
    device, dtype = parameter.device, parameter.dtype
    runs = [(len(list(equal)), *frame) for frame, equal in groupby(frames)]
    inputs = family.tower_inputs(tower, torch.tensor(runs))
    flash = uses_flash(device, dtype, family.head_width(tower))
    rows = sum(frame.patches for frame in frames)
    output = tower(
        _upload(patches, device, dtype),
        grid_thw=torch.tensor(runs),
        cu_seqlens=torch.tensor([0, rows], dtype=torch.int32),  # one segment, see `packed_attention`
        cu_window_seqlens=torch.tensor([0, rows], dtype=torch.int32),
        segments={name: Segments.of(lengths, device, flash) for name, lengths in inputs.segments.items()},
        **{name: upload(value, device) for name, value in inputs.tensors.items()},
    )
    return torch.stack([output.pooler_output, *getattr(output, "deepstack_features", ())], dim=1)


def _rows(parts: Sequence[Patches], first: int, stop: int) -> Iterator[Patches]:
    """Yield the rows from `first` to before `stop` of patches that stand one after the other."""
    for part in parts:
        if first < len(part) and stop > 0:
            yield part[max(first, 0) : stop]
        first, stop = first - len(part), stop - len(part)


def _upload(parts: Sequence[Patches], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the numbers of patches on the device. Bytes go there, because they are a fraction of the numbers."""
    values = []
    for _, alike in groupby(parts, key=lambda part: (id(part.levels), part.repeats, part.pixels.shape[1:])):
        run = list(alike)
        pixels = replace(run[0], pixels=_upload_bytes([part.pixels for part in run], device))
        values.append(pixels.values(dtype))
    return torch.cat(values) if len(values) > 1 else values[0]


def _upload_bytes(pixels: Sequence[Tensor], device: torch.device) -> Tensor:
    if device.type != "cuda" or not torch.cuda.is_available():
        return torch.cat(list(pixels)).to(device, non_blocking=True)
    pinned = torch.empty((sum(map(len, pixels)), *pixels[0].shape[1:]), dtype=torch.uint8, pin_memory=True)
    return torch.cat(list(pixels), out=pinned).to(device, non_blocking=True)
