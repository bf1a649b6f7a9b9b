"""Pictures of attention: an image, and beside it the heat map of the response rows with the asked cell outlined; with a
teacher, its heat map of the same rows as a third. Several images, or the frames of a video, make a contact sheet."""

import io
from dataclasses import dataclass, replace
from typing import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from megatron_ral.data.targets import in_span
from megatron_ral.data.video import VideoSettings, read_clip
from megatron_ral.evaluation.evaluate import ProbeView
from megatron_ral.types import Box, Prompt

_SIDE = 224
_SHEET_SIDE = 112
_SHEET_COLUMNS = 8
_SHEET_PANELS = 16
_LABEL = 16
_GAP = 8


@dataclass(frozen=True)
class Panel:
    """One image or sampled frame of a prompt."""

    image: Image.Image
    label: str
    boxes: Sequence[Box]
    """Target boxes in pixels of the image; none: it is no target."""
    first_token: int
    """Of its visual tokens, counted over the prompt's."""
    rows: int
    columns: int

    def tokens(self, masses: np.ndarray) -> np.ndarray:
        """[rows, columns] of a value per visual token of the prompt."""
        return masses[self.first_token : self.first_token + self.rows * self.columns].reshape(self.rows, self.columns)

    def scaled(self, side: int, resample: Image.Resampling = Image.Resampling.NEAREST) -> "Panel":
        """The same with its longer side of `side` pixels."""
        scale = side / max(self.image.size)
        size = (max(1, round(self.image.width * scale)), max(1, round(self.image.height * scale)))
        return replace(
            self,
            image=self.image.resize(size, resample),
            boxes=[tuple(value * scale for value in box) for box in self.boxes],
        )


def attention_picture(view: ProbeView, settings: VideoSettings) -> np.ndarray:
    """Picture of one probe.

    Args:
        view: probe with at least one image or video.
        settings: how the checkpoint reads a video.

    Returns:
        [height, width, 3] uint8. One image: image | heat map over it (| the teacher's). Otherwise a contact sheet: under
        each image or sampled frame its heat map (and the teacher's), in shares of all visual tokens; both frames of a
        temporal patch show that patch's. Of more than 16 frames the targets and those most looked at are shown. A white
        frame marks each target box, a white label each frame with one.
    """
    panels = list(sample_panels(view.prompt, settings))
    shares = [
        _share(attention) for attention in (view.visual_attention, view.teacher_attention) if attention is not None
    ]
    if len(panels) == 1 and not view.prompt.is_video.any():
        pictures = _pictures(panels[0].scaled(_SIDE), shares)
        return _joined(pictures, len(pictures))
    columns = [_column(panel.scaled(_SHEET_SIDE), shares) for panel in most_looked_at(panels, shares[0])]
    return _joined(columns, _SHEET_COLUMNS)


def most_looked_at(panels: Sequence[Panel], share: np.ndarray, limit: int = _SHEET_PANELS) -> list[Panel]:
    """Those with targets, then those with the largest sum of `share` (a value per visual token), in their own order."""
    chosen = sorted(
        range(len(panels)),
        reverse=True,
        key=lambda index: (bool(panels[index].boxes), panels[index].tokens(share).sum()),
    )[:limit]
    return [panels[index] for index in sorted(chosen)]


def sample_panels(prompt: Prompt, settings: VideoSettings) -> Iterator[Panel]:
    """Images and sampled frames of a prompt in the order of their tokens."""
    sample, start = prompt.sample, 0
    for number, (grid, is_video) in enumerate(zip(prompt.grid_thw.tolist(), prompt.is_video.tolist())):
        rows, columns = (value // settings.merge_size for value in grid[1:])
        if not is_video:
            image = Image.open(io.BytesIO(sample.images[number])).convert("RGB")
            yield Panel(image, f"image {number + 1}", () if number else sample.target_boxes, start, rows, columns)
        else:
            clip = read_clip(sample.videos[number - len(sample.images)], settings)
            spans = sample.target_frames if number == len(sample.images) else ()
            shown = [in_span(clip.timestamps, span) for span in spans]
            for index, frame in enumerate(clip.frames):
                image = Image.fromarray(frame.permute(1, 2, 0).numpy())
                whole = (0.0, 0.0, *map(float, image.size))
                boxes = [box for span, where in zip(spans, shown) if where[index] for box in span.boxes or (whole,)]
                token = start + index // settings.temporal_patch_size * rows * columns
                yield Panel(image, f"{clip.timestamps[index]:.1f} s", boxes, token, rows, columns)
        start += grid[0] * rows * columns


def _share(attention: Tensor) -> np.ndarray:
    """Of the mass on all visual tokens."""
    return attention.numpy() / max(float(attention.sum()), 1e-30)


def _pictures(panel: Panel, shares: Sequence[np.ndarray]) -> list[Image.Image]:
    """The image and its heat maps, target boxes framed."""
    pictures = [panel.image] + [_overlay(panel.image, panel.tokens(share), float(share.max())) for share in shares]
    for picture in pictures:
        draw = ImageDraw.Draw(picture)
        for x0, y0, x1, y1 in panel.boxes:
            draw.rectangle((x0 + 1, y0 + 1, max(x0 + 1, x1 - 2), max(y0 + 1, y1 - 2)), outline="white", width=3)
    return pictures


def _column(panel: Panel, shares: Sequence[np.ndarray]) -> Image.Image:
    """Label, image and heat maps under one another."""
    pictures = _pictures(panel, shares)
    column = Image.new("RGB", (_SHEET_SIDE, _LABEL + len(pictures) * (_SHEET_SIDE + 2)), "gray")
    draw = ImageDraw.Draw(column)
    if panel.boxes:
        draw.rectangle((0, 0, _SHEET_SIDE, _LABEL - 1), fill="white")
    draw.text((_SHEET_SIDE / 2, _LABEL / 2), panel.label, fill="black", anchor="mm")
    for index, picture in enumerate(pictures):
        column.paste(picture, (0, _LABEL + index * (_SHEET_SIDE + 2)))
    return column


def _joined(pictures: Sequence[Image.Image], per_line: int) -> np.ndarray:
    """Pictures of one size side by side on white, `per_line` of them before the next line begins."""
    width, height = pictures[0].size
    columns, lines = min(per_line, len(pictures)), -(-len(pictures) // per_line)
    joined = Image.new("RGB", (columns * (width + _GAP) - _GAP, lines * (height + _GAP) - _GAP), "white")
    for index, picture in enumerate(pictures):
        joined.paste(picture, (index % per_line * (width + _GAP), index // per_line * (height + _GAP)))
    return np.asarray(joined)


def _overlay(plain: Image.Image, share: np.ndarray, peak: float) -> Image.Image:
    """The image under the heat map of `share` [rows, columns], white at `peak`, with percentages where the cells are
    large enough."""
    rows, columns = share.shape
    heat = Image.fromarray(colour(share / max(peak, 1e-30))).resize(plain.size, Image.Resampling.NEAREST)
    overlay = Image.blend(plain, heat, 0.6)
    draw = ImageDraw.Draw(overlay)
    if rows * columns <= 64:  # larger grids: the colours alone
        for row in range(rows):
            for column in range(columns):
                draw.text(
                    ((column + 0.5) * plain.width / columns, (row + 0.8) * plain.height / rows),
                    f"{100 * share[row, column]:.0f}%",
                    fill="white",
                    anchor="mm",
                    stroke_width=1,
                    stroke_fill="black",
                )
    return overlay


def colour(level: np.ndarray) -> np.ndarray:
    """Black - red - yellow - white for 0..1."""
    channels = [np.clip(3 * level - offset, 0, 1) for offset in range(3)]
    return (np.stack(channels, axis=-1) * 255).astype(np.uint8)
