"""Multimodal rotary positions (temporal, height, width) of the Qwen-VL families, and the angles they give."""

import itertools
from typing import Optional, Sequence

import numpy as np
import torch
from torch import Tensor


def multimodal_positions(
    is_visual: Tensor, grids: Tensor, spatial_merge_size: int, temporal_intervals: Optional[Sequence[float]] = None
) -> tuple[Tensor, int]:
    """Return the position ids of one prompt.

    Text advances all three coordinates together. An image or video of grid (t, h, w) that starts at position s gives
    its token (i, y, x) the coordinates (s + floor(i * interval), s + y, s + x), with y < h / merge and x < w / merge.
    The text after it continues at s + max(h, w) / merge.

    Args:
        is_visual: [P] bool, True at visual tokens. Each run of visual tokens holds whole images or videos.
        grids: [V, 3] int64 patches (t, h, w) of each image or video in the order of their tokens.
        spatial_merge_size: patches per visual token and side.
        temporal_intervals: [V] positions between two temporal patches; None for 1 everywhere. Qwen2.5-VL takes tokens
            per second times seconds per patch for a video.

    Returns:
        ([3, P] int64 positions, position of the next text token).

    Raises:
        ValueError: the visual tokens do not match the grids.

    Source: Qwen2-VL (arXiv 2409.12191) section 2.1, Qwen2.5-VL (arXiv 2502.13923) section 2.1.2. The position after a
    video follows transformers 5. Up to version 4 it followed the largest coordinate, the temporal one included.
    """
    # NumPy, because a prompt has many short runs, and an operation of PyTorch takes as long as a hundred tokens.
    flags = is_visual.numpy()
    places = np.empty((3, len(flags)), np.int64)
    intervals = [1.0] * len(grids) if temporal_intervals is None else temporal_intervals
    sizes, changes = grids.tolist(), np.flatnonzero(flags[1:] != flags[:-1]) + 1
    position, number = 0, 0
    for index, end in itertools.pairwise([0, *changes.tolist(), len(flags)]):
        if not flags[index : index + 1].any():
            places[:, index:end] = np.arange(position, position + end - index)
            position += end - index
            continue
        while index < end:
            if number >= len(sizes):
                raise ValueError(f"visual tokens at position {index} belong to no image or video ({len(sizes)} in all)")
            t, h, w = sizes[number][0], sizes[number][1] // spatial_merge_size, sizes[number][2] // spatial_merge_size
            if index + t * h * w > end:
                raise ValueError(
                    f"image or video {number} needs {t * h * w} visual tokens in one run at position {index}"
                )
            axes = np.empty((3, t, h, w), np.int64)
            # in float32, as transformers multiplies
            seconds = (np.arange(t, dtype=np.float32) * np.float32(intervals[number])).astype(np.int64)
            axes[0] = position + seconds[:, None, None]
            axes[1], axes[2] = position + np.arange(h)[:, None], position + np.arange(w)
            places[:, index : index + t * h * w] = axes.reshape(3, -1)
            position, index, number = position + max(h, w), index + t * h * w, number + 1
    if number != len(sizes):
        raise ValueError(f"{len(sizes)} images or videos but visual tokens for {number}")
    return torch.from_numpy(places), position


def rotary_axes(sections: Sequence[int], interleaved: bool) -> Tensor:
    """Return which of the coordinates (temporal, height, width) each frequency follows, [D / 2] int64.

    Args:
        sections: number of frequencies of each coordinate; their sum is D / 2.
        interleaved: order of the coordinates. False: the first sections[0] frequencies follow the temporal coordinate,
            the next the height, the last the width (Qwen2.5-VL). True: temporal, height and width alternate until
            height and width have had their share, and the rest is temporal (Qwen3-VL).
    """
    axes = [coordinate for coordinate, count in enumerate(sections) for _ in range(count)]
    if interleaved:
        axes = [0] * len(axes)
        for coordinate in (1, 2):
            for place in range(coordinate, min(3 * sections[coordinate], len(axes)), 3):
                axes[place] = coordinate
    return torch.tensor(axes)


def rotary_angles(position_ids: Tensor, inverse_frequencies: Tensor, axes: Tensor) -> Tensor:
    """Return the rotation angle of every position and channel. Each frequency follows one of the three coordinates.

    Args:
        position_ids: [3, B, S] int64 (temporal, height, width).
        inverse_frequencies: [D / 2] float32.
        axes: [D / 2] int64 coordinate of each frequency (`rotary_axes`), on the device of the positions.

    Returns:
        [S, B, 1, D] float32 with two equal halves, the layout that megatron-core expects.
    """
    angles = position_ids[axes].float() * inverse_frequencies[:, None, None]  # [D / 2, B, S]
    return torch.cat([angles, angles]).permute(2, 1, 0)[:, :, None].contiguous()
