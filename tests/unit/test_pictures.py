"""Attention pictures: places of heat and frames, for one image, several, and a video."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ral.data.processor import PromptProcessor
from megatron_ral.evaluation.attention_pictures import attention_picture
from megatron_ral.evaluation.probes import ProbeView
from megatron_ral.types import FramePictures, Sample, TargetFrames


def picture(width=56, height=56, level=60) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (0, level, 0)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def processor(material) -> PromptProcessor:
    return PromptProcessor(str(material["tiny"]), 1024)


def drawn(processor, looked_at: dict[int, float], teacher: dict[int, float] | None = None, **fields) -> np.ndarray:
    """Return the picture of a sample whose visual tokens have the given masses."""
    sample = Sample(
        "k", "s", "Which digit is red?", "<answer>3</answer>", "", "", **{"images": (), "target_boxes": (), **fields}
    )
    prompt = processor(sample)
    masses = [torch.zeros(int(prompt.visual_mask.sum())) for _ in range(2)]
    for mass, values in zip(masses, (looked_at, teacher or {})):
        for token, value in values.items():
            mass[token] = value
    view = ProbeView(prompt, "", masses[0], masses[1] if teacher else None)
    return attention_picture(view, processor.video)


def is_hot(pixels: np.ndarray) -> bool:
    """Return True where the heat map is at its peak (red and blue up, over green at 60)."""
    return bool(((pixels[..., 0] > 140) & (pixels[..., 2] > 140) & (pixels[..., 0] < 200)).mean() > 0.1)


def test_one_image_stands_beside_its_heat_map(processor):
    made = drawn(processor, {1: 0.2, 2: 0.1}, images=(picture(),), target_boxes=((28, 0, 56, 28),))
    assert made.shape == (224, 2 * 224 + 8, 3)
    plain, heat = made[:, :224], made[:, 232:]
    assert is_hot(heat[:112, 112:]) and not is_hot(heat[:112, :112]) and not is_hot(plain)
    for part in (plain, heat):
        assert (part[1:4, 120:200] == 255).all(), "the target's frame"
        assert (part[116:119, 10:100] != 255).any()
    assert drawn(processor, {0: 1.0}, {3: 1.0}, images=(picture(),)).shape == (224, 3 * 224 + 16, 3)


def columns(made: np.ndarray, count: int, rows: int) -> list[list[np.ndarray]]:
    """Return the cells of a contact sheet of one line: [column][label, picture, heat ...]."""
    assert made.shape == (16 + rows * 114, count * 120 - 8, 3)
    parts = [made[:, index * 120 : index * 120 + 112] for index in range(count)]
    return [[part[:16], *(part[16 + row * 114 : 128 + row * 114] for row in range(rows))] for part in parts]


def test_a_video_is_a_contact_sheet(processor):
    """Six frames, three temporal patches of 2 x 2 tokens. Most looked at: patch 1, upper right; target: frame 4."""
    clip = FramePictures(tuple(picture() for _ in range(6)), fps=1.0)
    made = columns(
        drawn(processor, {5: 0.4, 8: 0.1}, videos=(clip,), target_frames=(TargetFrames((4, 5), ((0, 28, 28, 56),)),)),
        6,
        2,
    )
    for index, (label, plain, heat) in enumerate(made):
        assert is_hot(heat[:56, 56:]) == (index in (2, 3)), "both frames of the patch"
        assert not is_hot(heat[56:]) and not is_hot(plain)
        framed = (plain[57:60, 10:46] == 255).all()
        assert framed == (index == 4) == bool((label == 255).all(axis=-1).any())


def test_a_teacher_has_a_line_of_its_own(processor):
    clip = FramePictures(tuple(picture() for _ in range(4)), fps=1.0)
    made = columns(drawn(processor, {0: 1.0}, {7: 1.0}, videos=(clip,)), 4, 3)
    assert [[is_hot(cell) for cell in column[2:]] for column in made] == [[True, False]] * 2 + [[False, True]] * 2


def test_several_images_are_a_contact_sheet(processor):
    made = columns(
        drawn(processor, {4: 1.0}, images=(picture(), picture(28, 28)), target_boxes=((0, 0, 28, 28),)), 2, 2
    )
    assert [is_hot(column[2]) for column in made] == [False, True]
    assert (made[0][1][1:4, 10:46] == 255).all() and not (made[1][1] == 255).any()


def test_of_a_long_video_targets_and_what_is_looked_at_are_shown(processor):
    clip = FramePictures(tuple(picture(level=40 + 4 * index) for index in range(40)), fps=1.0)
    made = drawn(
        processor, {4 * patch: 1.0 for patch in range(10, 17)}, videos=(clip,), target_frames=(TargetFrames((0, 1)),)
    )
    assert made.shape == (2 * (16 + 2 * 114) + 8, 8 * 120 - 8, 3), "two lines of eight"
    first, last = made[60, 56], made[60 + 252, 7 * 120 + 56]
    assert first[1] == 40, "the target is the first frame"
    assert last[1] == 40 + 4 * 33, "then those of patches 10 to 16, in order of time"
