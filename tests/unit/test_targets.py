"""From annotated boxes and seconds to visual tokens: hand values, wrong annotations, both families."""

import json

import pytest
import torch

from megatron_ral.data.issues import SampleError
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.data.shards import parse_sample
from megatron_ral.data.targets import clip_cells, image_cells, in_span, parse_target_frames
from megatron_ral.data.video import DecodedVideo
from megatron_ral.types import FramePictures, TargetFrames
from tests.unit.test_data import png, record
from tests.unit.test_video import clip as mp4_clip


def decoded(num_frames: int, fps: float = 1.0) -> DecodedVideo:
    """Return frames of 60 x 40 pixels."""
    return DecodedVideo(torch.zeros(num_frames, 3, 40, 60).byte(), torch.arange(num_frames).double() / fps, fps)


def parsed(members: dict, **changes):
    return parse_sample({"__key__": "k", "__url__": "a.tar", **members, "json": json.dumps(record(**changes)).encode()})


def test_tokens_of_boxes_in_an_image():
    """3 x 2 tokens of 20 pixels: a token counts where its centre lies in a box."""
    cells = image_cells([(0, 0, 11, 20), (30, 25, 60, 40)], 60, 40, 2, 3)
    assert cells.tolist() == [[True, False, False], [False, True, True]]
    assert not image_cells([(0, 0, 9, 40)], 60, 40, 2, 3).any(), "no centre lies that far to the left"
    assert not image_cells([], 60, 40, 2, 3).any()


@pytest.mark.parametrize(
    "spans, wanted",
    [
        ([((0, 1), ())], [1, 0, 0]),
        ([((1, 2), ())], [1, 0, 0]),  # the second frame of the first temporal patch
        ([((1, 3), ())], [1, 1, 0]),
        ([((2, 2.5), ())], [0, 1, 0]),
        ([((4, 5), ())], [0, 0, 1]),  # the fifth frame stands alone in the last patch
        ([((2.1, 2.9), ())], [0, 0, 0]),  # between two sampled frames
        ([((0, 1), ()), ((4, 5.9), ())], [1, 0, 1]),
        ([((1.9995, 2.9995), ())], [0, 1, 0]),  # a clock of milliseconds
        ([], [0, 0, 0]),
    ],
)
def test_temporal_patches_of_a_span(spans, wanted):
    cells = clip_cells([TargetFrames(*span) for span in spans], decoded(5), (3, 2, 3), 2)
    assert cells.shape == (3, 2, 3)
    assert cells.flatten(1).all(1).int().tolist() == wanted == cells.flatten(1).any(1).int().tolist()


def test_boxes_belong_to_their_span():
    targets = [TargetFrames((0, 2), ((0, 0, 20, 20),)), TargetFrames((2, 4), ((40, 20, 60, 40), (0, 20, 20, 40)))]
    cells = clip_cells(targets, decoded(4), (2, 2, 3), 2)
    assert cells.int().tolist() == [[[1, 0, 0], [0, 0, 0]], [[0, 0, 0], [1, 0, 1]]]


def test_times_follow_the_sampled_frames_of_a_slow_clip():
    """A frame every two seconds."""
    slow = decoded(4, fps=0.5)
    assert in_span(slow.timestamps, TargetFrames((4, 6))).tolist() == [False, False, True, False]
    assert clip_cells([TargetFrames((6, 8))], slow, (2, 1, 1), 2).flatten().tolist() == [False, True]
    assert clip_cells([TargetFrames((6, 9.9))], slow, (2, 1, 1), 2).flatten().tolist() == [False, True]


@pytest.mark.parametrize(
    "span, boxes, message",
    [
        ((-1, 2), (), "from -1 to 2 s do not lie in the video of 5 s"),
        ((3, 3), (), "from 3 to 3 s"),
        ((4, 2), (), "from 4 to 2 s"),
        ((5, 6), (), "from 5 to 6 s"),
        ((4, 6.5), (), "from 4 to 6.5 s"),
        ((0, 2), ((0, 0, 61, 20),), r"target box \(0, 0, 61, 20\) is not inside the video frame of 60 x 40 pixels; "),
        ((0, 2), ((0, 0, 61, 20),), r"\[x0, y0, x1, y1\] are pixels of the upright picture$"),
        ((0, 2), ((0.25, 0.1, 0.5, 1),), "lies in one pixel of the video frame; if these are shares of its width and"),
        ((0, 2), ((5, 5, 5, 20),), "is not inside"),
        ((0, 2), ((0, 0, float("nan"), 20),), "is not inside"),
    ],
)
def test_wrong_spans_and_boxes(span, boxes, message):
    with pytest.raises(SampleError, match=message):
        clip_cells([TargetFrames(span, boxes)], decoded(5), (3, 2, 3), 2)


@pytest.mark.parametrize(
    "value, message",
    [
        ({"seconds": [0, 1]}, "target_frames must be a list, not dict"),
        ([[0, 1]], "target_frames must be a list of"),
        ([{"boxes": []}], "target_frames must be a list of"),
        ([{"seconds": [0]}], "target_frames must be a list of"),
        ([{"seconds": [0, "x"]}], "target_frames must be a list of"),
        ([{"seconds": [0, float("inf")]}], "target_frames must be a list of"),
        ([{"seconds": [0, 1], "box": [1, 2, 3, 4]}], "target_frames must be a list of"),
        ([{"seconds": [0, 1], "boxes": [[1, 2, 3]]}], "boxes of target_frames must be a list of"),
    ],
)
def test_annotations_that_cannot_be_read(value, message):
    with pytest.raises(SampleError, match=message):
        parse_target_frames(value)
    with pytest.raises(ValueError, match=f"sample 'k': {message}"):
        parsed({"mp4": b""}, data_type="video", target_boxes=[], target_frames=value)


@pytest.mark.parametrize("family", ["tiny", "qwen3"])
def test_target_mask_of_an_image_and_a_video(material, family):
    """Image boxes mark image tokens, target frames mark those of the first video; a second video has none."""
    processor = PromptProcessor(str(material[family]), 256)
    side = processor.video.token_side
    frames = FramePictures(tuple(png(2 * side, 2 * side) for _ in range(6)), fps=1.0)
    sample = parsed({"png": png(2 * side, side)}, target_boxes=[[0, 0, side, side]])
    sample = type(sample)(
        **{
            **vars(sample),
            "videos": (frames, frames),
            "target_frames": (
                TargetFrames((1, 2), ((0, 0, side, side),)),
                TargetFrames((4, 6), ((side, side, 2 * side, 2 * side),)),
            ),
        }
    )
    prompt = processor(sample)
    assert prompt.is_video.tolist() == [False, True, True]
    # image: 2 tokens; each video: 3 temporal patches of 2 x 2
    wanted = [1, 0] + [1, 0, 0, 0] + [0, 0, 0, 0] + [0, 0, 0, 1] + [0] * 12
    assert prompt.target_mask[prompt.visual_mask].int().tolist() == wanted
    assert not prompt.target_mask[~prompt.visual_mask].any()


def test_samples_with_a_wrong_annotation_are_named(material):
    processor, clip = PromptProcessor(str(material["tiny"]), 256), mp4_clip("mp4", 40)  # 4 s of 64 x 48 pixels
    span = {"seconds": [1, 2], "boxes": [[0, 0, 32, 24]]}
    good = processor(parsed({"mp4": clip}, data_type="video", target_boxes=[], target_frames=[span]))
    assert 0 < int(good.target_mask.sum()) < int(good.visual_mask.sum())
    for members, changes, message in [
        (
            {"mp4": clip},
            {"target_boxes": [], "target_frames": [{**span, "seconds": [9, 10]}]},
            "do not lie in the video of 4 s",
        ),
        (
            {"mp4": clip},
            {"target_boxes": [], "target_frames": [{**span, "boxes": [[0, 0, 99, 9]]}]},
            "frame of 64 x 48",
        ),
        ({"png": png()}, {"target_boxes": [], "target_frames": [span]}, "has target_frames but no video"),
        ({"mp4": clip}, {"target_boxes": [[0, 0, 9, 9]]}, "has target_boxes but no image"),
    ]:
        sample = parsed(members, data_type="video" if "mp4" in members else "image", **changes)
        with pytest.raises(SampleError, match=f"sample 'k'.*{message}"):
            processor(sample)
