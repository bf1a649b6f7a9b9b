"""Pictures of attention: the image, and beside it the heat map of the response rows with the asked cell outlined; with a
teacher, its heat map of the same rows as a third."""

import io

import numpy as np
from PIL import Image, ImageDraw

from megatron_ral.rollout.evaluation import ProbeView

_SIDE = 224


def attention_picture(view: ProbeView, merge_size: int) -> np.ndarray:
    """Picture of one probe.

    Args:
        view: probe with one image.
        merge_size: patches per visual token and side.

    Returns:
        [height, width, 3] uint8: image | heat map over the image (| the teacher's); a white frame marks each target box.
    """
    image = Image.open(io.BytesIO(view.prompt.sample.images[0])).convert("RGB")
    scale = _SIDE / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    plain = image.resize(size, Image.Resampling.NEAREST)
    rows, columns = (int(value) // merge_size for value in view.prompt.grid_thw[0, 1:])
    pictures = [plain]
    for attention in (view.visual_attention, view.teacher_attention):
        if attention is not None:
            pictures.append(_overlay(plain, attention[: rows * columns].view(rows, columns).numpy()))
    for picture in pictures:
        draw = ImageDraw.Draw(picture)
        for box in view.prompt.sample.target_boxes:
            x0, y0, x1, y1 = (value * scale for value in box)
            draw.rectangle((x0 + 1, y0 + 1, x1 - 2, y1 - 2), outline="white", width=3)
    joined = Image.new("RGB", (len(pictures) * (size[0] + 8) - 8, size[1]), "white")
    for index, picture in enumerate(pictures):
        joined.paste(picture, (index * (size[0] + 8), 0))
    return np.asarray(joined)


def _overlay(plain: Image.Image, mass: np.ndarray) -> Image.Image:
    """The image under the heat map of `mass` [rows, columns], with percentages where the cells are large enough."""
    rows, columns = mass.shape
    share = mass / max(float(mass.sum()), 1e-30)
    heat = Image.fromarray(_colour(share / max(float(share.max()), 1e-30))).resize(plain.size, Image.Resampling.NEAREST)
    overlay = Image.blend(plain, heat, 0.6)
    draw = ImageDraw.Draw(overlay)
    if rows * columns <= 64:  # larger grids: the colours alone
        for row in range(rows):
            for column in range(columns):
                draw.text(((column + 0.5) * plain.width / columns, (row + 0.8) * plain.height / rows),
                          f"{100 * share[row, column]:.0f}%", fill="white", anchor="mm", stroke_width=1, stroke_fill="black")
    return overlay


def _colour(level: np.ndarray) -> np.ndarray:
    """Black - red - yellow - white for 0..1."""
    channels = [np.clip(3 * level - offset, 0, 1) for offset in range(3)]
    return (np.stack(channels, axis=-1) * 255).astype(np.uint8)
