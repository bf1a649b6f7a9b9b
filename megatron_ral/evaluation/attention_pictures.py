"""Pictures of attention: an image beside the heat map of its response rows, target boxes outlined.

With a teacher, a third picture shows the teacher's heat map of the same rows. Several images, or the frames of a video,
make a contact sheet.
"""

from dataclasses import dataclass, replace
from typing import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from megatron_ral.data.pictures import read_picture
from megatron_ral.data.targets import in_span
from megatron_ral.data.video import VideoSettings, read_clip
from megatron_ral.evaluation.probes import ProbeView
from megatron_ral.models.families import FAMILIES
from megatron_ral.types import Box, Prompt

_SIDE = 224
"""Pixels of the longer side of a lone image."""
_SHEET_SIDE = 112
"""Pixels of the longer side of an image on a contact sheet."""
_SHEET_COLUMNS = 8
_SHEET_PANELS = 16
_LABEL = 16
"""Height of a label in pixels."""
_GAP = 8
"""Pixels between pictures."""


@dataclass(frozen=True)
class Panel:
    """One image or sampled frame of a prompt."""

    image: Image.Image
    label: str
    boxes: Sequence[Box]
    """Target boxes in pixels of the image; empty where the image is no target."""
    cells: np.ndarray
    """[rows, columns] index, among the visual tokens of the prompt, of the token that shows each cell of the image."""

    def tokens(self, masses: np.ndarray) -> np.ndarray:
        """Return the panel's part, [rows, columns], of one value per visual token of the prompt."""
        return masses[self.cells]

    def scaled(self, side: int, resample: Image.Resampling = Image.Resampling.NEAREST) -> "Panel":
        """Return the panel resized to `side` pixels on its longer side."""
        scale = side / max(self.image.size)
        size = (max(1, round(self.image.width * scale)), max(1, round(self.image.height * scale)))
        return replace(
            self,
            image=self.image.resize(size, resample),
            boxes=[tuple(value * scale for value in box) for box in self.boxes],
        )


def attention_picture(view: ProbeView, settings: VideoSettings) -> np.ndarray:
    """Return the picture of one probe.

    A lone image stands on the left, with the heat map over it on the right, and the teacher's heat map after that.
    Several images, or a video, make a contact sheet: the heat map stands under each image or sampled frame, in shares
    of all visual tokens, with the teacher's heat map under it. Both frames of a temporal patch show the heat of that
    patch. A sheet shows at most 16 frames: the targets first, then the frames with the most attention. A white outline
    marks each target box, a white label each frame that has one.

    Args:
        view: Probe with at least one image or video.
        settings: Rules by which the checkpoint samples a video.

    Returns:
        [height, width, 3] uint8.
    """
    panels = list(sample_panels(view.prompt, settings))
    shares = [
        _share(attention) for attention in (view.visual_attention, view.teacher_attention) if attention is not None
    ]
    if len(panels) == 1 and not view.prompt.is_video.any():
        pictures = _pictures(panels[0].scaled(_SIDE), shares)
        return _joined(pictures, len(pictures))
    columns = [_column(panel.scaled(_SHEET_SIDE), shares) for panel in most_attended(panels, shares[0])]
    return _joined(columns, _SHEET_COLUMNS)


def most_attended(panels: Sequence[Panel], share: np.ndarray, limit: int = _SHEET_PANELS) -> list[Panel]:
    """Select at most `limit` panels: those with targets first, then those with the most attention.

    Args:
        panels: Panels of one prompt.
        share: [visual tokens], share of the attention on each visual token of the prompt.
        limit: Largest number of panels.

    Returns:
        The selected panels in their original order.
    """
    chosen = sorted(
        range(len(panels)),
        reverse=True,
        key=lambda index: (bool(panels[index].boxes), panels[index].tokens(share).sum()),
    )[:limit]
    return [panels[index] for index in sorted(chosen)]


def sample_panels(prompt: Prompt, settings: VideoSettings) -> Iterator[Panel]:
    """Yield the views of images, and the sampled frames, of a prompt in the order of their visual tokens."""
    sample, start, family = prompt.sample, 0, FAMILIES[settings.family]
    for number, (grid, is_video) in enumerate(zip(prompt.grid_thw.tolist(), prompt.is_video.tolist())):
        rows, columns = (value // settings.merge_size for value in grid[1:])
        if not is_video:
            image = read_picture(sample.images[number])
            boxes = () if number else sample.target_boxes
            for view in family.picture_views((grid[0], rows, columns), settings.token_side, *image.size):
                label = f"image {number + 1}" + (f", {view.name}" if view.name else "")
                yield Panel(image, label, boxes, start + view.tokens.numpy())
        else:
            clip = read_clip(sample.videos[number - len(sample.images)], settings)
            spans = sample.target_frames if number == len(sample.images) else ()
            shown = [in_span(clip.timestamps, span) for span in spans]
            for index, frame in enumerate(clip.frames):
                image = Image.fromarray(frame.permute(1, 2, 0).numpy())
                whole = (0.0, 0.0, float(image.width), float(image.height))
                boxes = [box for span, where in zip(spans, shown) if where[index] for box in span.boxes or (whole,)]
                token = start + index // settings.temporal_patch_size * rows * columns
                cells = token + np.arange(rows * columns).reshape(rows, columns)
                yield Panel(image, f"{clip.timestamps[index]:.1f} s", boxes, cells)
        start += grid[0] * rows * columns


def _share(attention: Tensor) -> np.ndarray:
    """Return the attention on each visual token as a share of the attention on all of them."""
    return attention.numpy() / max(float(attention.sum()), 1e-30)


def _pictures(panel: Panel, shares: Sequence[np.ndarray]) -> list[Image.Image]:
    """Return the image and its heat maps, with the target boxes outlined."""
    pictures = [panel.image] + [_overlay(panel.image, panel.tokens(share), float(share.max())) for share in shares]
    for picture in pictures:
        draw = ImageDraw.Draw(picture)
        for x0, y0, x1, y1 in panel.boxes:
            draw.rectangle((x0 + 1, y0 + 1, max(x0 + 1, x1 - 2), max(y0 + 1, y1 - 2)), outline="white", width=3)
    return pictures


def _column(panel: Panel, shares: Sequence[np.ndarray]) -> Image.Image:
    """Return a column of a contact sheet: label, image and heat maps."""
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
    """Return pictures of one size on a white ground, `per_line` of them side by side."""
    width, height = pictures[0].size
    columns, lines = min(per_line, len(pictures)), -(-len(pictures) // per_line)
    joined = Image.new("RGB", (columns * (width + _GAP) - _GAP, lines * (height + _GAP) - _GAP), "white")
    for index, picture in enumerate(pictures):
        joined.paste(picture, (index % per_line * (width + _GAP), index // per_line * (height + _GAP)))
    return np.asarray(joined)


def _overlay(plain: Image.Image, share: np.ndarray, peak: float) -> Image.Image:
    """Return the image under the heat map of `share` [rows, columns], which is white at `peak`.

    Percentages are written into the cells where these are large enough.
    """
    rows, columns = share.shape
    heat = Image.fromarray(colour(share / max(peak, 1e-30))).resize(plain.size, Image.Resampling.NEAREST)
    overlay = Image.blend(plain, heat, 0.6)
    draw = ImageDraw.Draw(overlay)
    if rows * columns <= 64:  # the cells of a larger grid have no room for text
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
    """Map levels in [0, 1] to [..., 3] uint8 colours from black over red and yellow to white."""
    channels = [np.clip(3 * level - offset, 0, 1) for offset in range(3)]
    return (np.stack(channels, axis=-1) * 255).astype(np.uint8)
