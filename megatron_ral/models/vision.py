"""Pictures and videos through the vision tower, in calls of bounded size.

A tower reads frames: a picture is one frame or several (tiles), a video has one per temporal patch. Frames do not see
each other, neither in attention nor in positions. A sequence of frames may therefore be cut between any two of them,
and frames of one size that follow each other may stand as one video, whatever they belong to. Features are the same.

All that a tower derives from sizes is computed on the host, so that no block waits for the device.
"""

from itertools import groupby
from typing import Iterator, NamedTuple, Sequence

import torch
from torch import Tensor

from megatron_ral.models.families import Family
from megatron_ral.models.packed_attention import Segments, upload, uses_flash

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
    tower: torch.nn.Module, family: Family, frames: Sequence[Frame], pixels: Sequence[Tensor], first: int = 0
) -> Tensor:
    """Return the features of consecutive frames. They carry gradient to the tower.

    Without frames the tower reads a small blank one, whose result is unused. A trained tower then has zero gradients,
    where a data-parallel rank without pictures would otherwise have none.

    Args:
        tower: Vision tower of transformers, built by `Family.build_tower`.
        family: Family of the model.
        frames: Frames to encode.
        pixels: Patches of all frames in order, [patches, values] each, in host memory. Tensors may hold any number.
        first: Row of `pixels`, counted over all tensors, at which `frames` begin.

    Returns:
        [visual tokens, 1 + D, H]: replacements of the word embeddings, then the features of D layers (DeepStack).
    """
    if not frames:
        frame = Frame(*family.blank_frame(tower))
        features = _call(tower, family, [frame], [torch.zeros(frame.patches, pixels[0].shape[1])])
        return features[:0] + 0.0 * features.sum()
    parts = []
    for call in calls(frames, PATCHES_PER_CALL):
        stop = first + sum(frame.patches for frame in call)
        parts.append(_call(tower, family, call, list(_rows(pixels, first, stop))))
        first = stop
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _call(tower: torch.nn.Module, family: Family, frames: Sequence[Frame], pixels: Sequence[Tensor]) -> Tensor:
    parameter = next(tower.parameters())
    device, dtype = parameter.device, parameter.dtype
    runs = [(len(list(equal)), *frame) for frame, equal in groupby(frames)]
    inputs = family.tower_inputs(tower, torch.tensor(runs))
    flash = uses_flash(device, dtype, family.head_width(tower))
    rows = sum(frame.patches for frame in frames)
    output = tower(
        _upload_pixels(pixels, device).to(dtype),
        grid_thw=torch.tensor(runs),
        cu_seqlens=torch.tensor([0, rows], dtype=torch.int32),  # one segment, see `packed_attention`
        cu_window_seqlens=torch.tensor([0, rows], dtype=torch.int32),
        segments={name: Segments.of(lengths, device, flash) for name, lengths in inputs.segments.items()},
        **{name: upload(value, device) for name, value in inputs.tensors.items()},
    )
    return torch.stack([output.pooler_output, *getattr(output, "deepstack_features", ())], dim=1)


def _rows(tensors: Sequence[Tensor], first: int, stop: int) -> Iterator[Tensor]:
    """Yield the rows from `first` to before `stop` of tensors that stand one after the other."""
    for tensor in tensors:
        if first < len(tensor) and stop > 0:
            yield tensor[max(first, 0) : stop]
        first, stop = first - len(tensor), stop - len(tensor)


def _upload_pixels(pixels: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the pixels as one tensor on the device, in their own type: a cast on the host is a slow second copy."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return torch.cat(list(pixels)).to(device, non_blocking=True)
    size = sum(map(len, pixels)), pixels[0].shape[1]
    pinned = torch.empty(size, dtype=pixels[0].dtype, pin_memory=True)
    return torch.cat(list(pixels), out=pinned).to(device, non_blocking=True)
