"""Annotated boxes -> target tokens: the visual tokens of an image or a clip that show the object asked for.

A token is a target if its centre lies in a box. In a video, its temporal patch must also hold a sampled frame inside
the annotated seconds. Boxes are in pixels of the upright picture, before the processor resizes it.
"""

import math
from typing import Any, Sequence

import torch
from torch import Tensor

from megatron_ral.data.issues import SampleError
from megatron_ral.data.video import CLOCK_TOLERANCE, DecodedVideo
from megatron_ral.types import Box, TargetFrames


def image_cells(boxes: Sequence[Box], width: int, height: int, rows: int, columns: int, what: str = "image") -> Tensor:
    """Return the target tokens of a picture.

    Args:
        boxes: (x0, y0, x1, y1) in pixels.
        width: pixels of the picture.
        height: pixels of the picture.
        rows: visual tokens from top to bottom.
        columns: visual tokens from left to right.
        what: name of the picture in the error.

    Returns:
        [rows, columns] bool.

    Raises:
        SampleError: a box is empty, reaches over the picture's edge, or lies in its first pixel, as shares of the width
            and height do (reason `target_box`).
    """
    centre_y = (torch.arange(rows) + 0.5) * height / rows
    centre_x = (torch.arange(columns) + 0.5) * width / columns
    cells = torch.zeros(rows, columns, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise SampleError(
                f"target box {(x0, y0, x1, y1)} is not inside the {what} of {width} x {height} pixels; "
                "[x0, y0, x1, y1] are pixels of the upright picture",
                "target_box",
            )
        if max(x1, y1) <= 1 < max(width, height):
            raise SampleError(
                f"target box {(x0, y0, x1, y1)} lies in one pixel of the {what}; if these are shares of its width and "
                "height, multiply them by both",
                "target_box",
            )
        cells |= ((centre_y >= y0) & (centre_y < y1))[:, None] & ((centre_x >= x0) & (centre_x < x1))[None, :]
    return cells


def clip_cells(
    targets: Sequence[TargetFrames], clip: DecodedVideo, grid: Sequence[int], temporal_patch_size: int
) -> Tensor:
    """Return the target tokens of a clip.

    An annotated span between two sampled frames marks nothing, because the model does not see it.

    Args:
        targets: annotated spans.
        clip: the sampled frames.
        grid: (t, rows, columns) in visual tokens.
        temporal_patch_size: sampled frames per temporal patch.

    Returns:
        [t, rows, columns] bool.

    Raises:
        SampleError: a span is empty, begins outside the clip or ends later than it by more than a sampled frame, or a
            box is wrong as in `image_cells` (reason `target_box`).
    """
    t, rows, columns = grid
    height, width = clip.frames.shape[2:]
    seconds, cells = len(clip.frames) / clip.fps, torch.zeros(t, rows, columns, dtype=torch.bool)
    for target in targets:
        start, end = target.seconds
        if not (0 <= start < min(end, seconds) and end <= seconds + 1 / clip.fps):
            raise SampleError(
                f"target_frames from {start:g} to {end:g} s do not lie in the video of {seconds:g} s", "target_box"
            )
        shown = (
            image_cells(target.boxes, width, height, rows, columns, "video frame")
            if target.boxes
            else torch.ones(rows, columns, dtype=torch.bool)
        )
        frames = in_span(clip.timestamps, target)
        padding = frames[-1:].expand(t * temporal_patch_size - len(frames))  # the last frame is repeated
        cells |= torch.cat([frames, padding]).view(t, -1).any(dim=1)[:, None, None] & shown
    return cells


def in_span(timestamps: Tensor, target: TargetFrames) -> Tensor:
    """Return which frames lie in an annotated span, its end left out.

    Args:
        timestamps: [T] seconds of the frames.
        target: the span.

    Returns:
        [T] bool.
    """
    start, end = target.seconds
    return (timestamps >= start - CLOCK_TOLERANCE) & (timestamps < end - CLOCK_TOLERANCE)


def parse_boxes(value: Any, field: str) -> tuple[Box, ...]:
    """Return the boxes of a JSON value.

    Args:
        value: list of [x0, y0, x1, y1], or None.
        field: name of the value in the error.

    Raises:
        SampleError: another form (reason `target_box`).
    """
    try:
        if any(isinstance(box, (str, dict)) for box in value or []):
            raise TypeError("a text or an object is no box")
        return tuple((float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in value or [])
    except (TypeError, ValueError, OverflowError):
        raise SampleError(f"{field} must be a list of [x0, y0, x1, y1]", "target_box") from None


def parse_target_frames(value: Any) -> tuple[TargetFrames, ...]:
    """Return the annotated spans of a JSON value.

    Args:
        value: list of `{"seconds": [start, end], "boxes": [[x0, y0, x1, y1], ...]}`, or None. A span without boxes
            covers the whole frame.

    Raises:
        SampleError: another form (reason `target_box`).
    """
    if not isinstance(value or [], list):
        raise SampleError(f"target_frames must be a list, not {type(value).__name__}", "target_box")
    spans = []
    for item in value or []:
        unknown = set(item) - {"seconds", "boxes"} if isinstance(item, dict) else {"no object"}
        try:
            start, end = map(float, item["seconds"])
        except (KeyError, TypeError, ValueError, OverflowError):
            unknown |= {"no seconds"}
        if unknown or not (math.isfinite(start) and math.isfinite(end)):
            raise SampleError(
                f'target_frames must be a list of {{"seconds": [start, end], "boxes": [[x0, y0, x1, y1], '
                f"...]}}, not of {str(item)[:80]}",
                "target_box",
            )
        spans.append(TargetFrames((start, end), parse_boxes(item.get("boxes"), "boxes of target_frames")))
    return tuple(spans)
