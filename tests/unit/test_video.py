"""Videos: which frames are taken, what is refused, and patches equal to the stock processors of transformers."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megatron_ral.config import ConfigError
from megatron_ral.data.video import (DecodedVideo, VideoError, VideoSettings, decode_video, frames_video,
                                     grid_timestamps, patchify_video, sample_indices, seconds_per_grid, video_grid,
                                     visual_token_count)

CODECS = {  # short groups of pictures, so that decoding skips some
    "mp4": ("mp4", "libx264", "yuv420p", {"g": "6", "bf": "2"}),
    "open groups": ("matroska", "libx264", "yuv420p", {"g": "6", "bf": "2", "x264-params": "open-gop=1"}),
    "mpeg4": ("mp4", "mpeg4", "yuv420p", {"g": "6", "bf": "2"}),
    "webm": ("webm", "libvpx-vp9", "yuv420p", {"g": "6"}),
    "gif": ("gif", "gif", "rgb8", {}),
}


def settings(family="qwen2_5_vl", **choices) -> VideoSettings:
    stock = dict(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3) if family == "qwen3_vl" else {}
    return VideoSettings.from_image_processor(Qwen2VLImageProcessorPil(**stock), family=family, **choices)


def clip(kind="mp4", count=20, rate=10, width=64, height=48, times=None) -> bytes:
    """Each frame is a ramp moved by its number, so that no two are alike; times: tenths of a second."""
    container, codec, pixels, options = CODECS[kind]
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.time_base = Fraction(1, rate)
        for index in range(count):
            ramp = (np.arange(width) * 4 + np.arange(height)[:, None] * 2 + index * 11) % 256
            frame = av.VideoFrame.from_ndarray(np.repeat(ramp[..., None], 3, 2).astype(np.uint8), format="rgb24")
            frame.pts = times[index] if times else index
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def all_frames(data: bytes) -> torch.Tensor:
    with av.open(io.BytesIO(data)) as container:
        return torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                            for frame in container.decode(video=0)])


def picture(level: int, width=32, height=24, kind="PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (level, 0, 0)).save(file, kind)
    return file.getvalue()


def noise(num_frames, height, width) -> DecodedVideo:
    frames = torch.randint(0, 256, (num_frames, 3, height, width), generator=torch.manual_seed(0)).byte()
    return DecodedVideo(frames, torch.arange(num_frames).double(), 1.0)


# --- sampling ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("num_frames, seconds, choices, wanted", [
    (100, 10.0, {}, [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]),
    (100, 9.9993, {}, [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]),     # a clock of milliseconds
    (100, 9.5, {}, [0, 12, 25, 37, 50, 62, 75, 87]),                # whole temporal patches
    (100, 1.0, {}, [0, 25, 50, 75]),                                # min_frames
    (100, 10.0, {"max_frames": 5}, [0, 25, 50, 75]),                # max_frames
    (100, 3.0, {"fps": 2.0}, [0, 16, 33, 50, 66, 83]),
    (3, 60.0, {}, [0, 1]),
    (1, 60.0, {}, [0]),
])
def test_sampled_indices(num_frames, seconds, choices, wanted):
    assert sample_indices(num_frames, seconds, settings(**choices)) == wanted


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("choices", [{"fps": 2.0}, {"fps": 100.0}, {"max_frames": 2, "min_frames": 2}])
def test_sampled_frames_are_those_of_a_full_decoding(kind, choices):
    data = clip(kind)
    video = decode_video(data, settings(**choices))
    indices = sample_indices(20, 2.0, settings(**choices))
    assert torch.equal(video.frames, all_frames(data)[indices])
    torch.testing.assert_close(video.timestamps, torch.tensor(indices).double() / 10)
    assert video.fps == pytest.approx(len(indices) / 2.0)


@pytest.mark.parametrize("count", range(2, 20, 2))
def test_frames_shown_before_the_keyframe_of_an_open_group_are_whole(count):
    data = clip("open groups", count=42)
    chosen = settings(fps=100.0, min_frames=2, max_frames=count)
    assert torch.equal(decode_video(data, chosen).frames, all_frames(data)[sample_indices(42, 4.2, chosen)])


def test_times_are_those_of_the_packets():
    """A clip with a pause: frames are counted, times are real."""
    data = clip("webm", count=8, times=[0, 1, 2, 3, 40, 41, 42, 43])
    video = decode_video(data, settings(max_frames=4))
    assert torch.equal(video.frames, all_frames(data)[::2])
    torch.testing.assert_close(video.timestamps, torch.tensor([0, 0.2, 4.0, 4.2], dtype=torch.float64))
    assert video.fps == pytest.approx(4 / (4.3 * 8 / 7))


def test_a_wrong_duration_in_the_header_is_not_believed():
    data = clip("webm")
    broken = overwrite(data, b"\x44\x89\x88", 0, struct.pack(">d", float("nan")))
    assert broken != data
    assert decode_video(broken, settings()).fps == decode_video(data, settings()).fps == pytest.approx(4 / 2.0)


def test_a_lone_frame_is_a_video():
    video = decode_video(clip("gif", count=1), settings())
    assert len(video.frames) == 1 and video.timestamps.tolist() == [0.0] and video.fps == 1.0
    assert patchify_video(video, settings())[1].tolist()[0] == 1
    assert grid_timestamps(video, settings()) == [0.0]


def test_frames_are_turned_as_the_file_says():
    data = clip("mp4", count=4)
    turned = overwrite(data, b"tkhd", 40, struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30))
    clockwise = decode_video(turned, settings()).frames
    assert torch.equal(clockwise, decode_video(data, settings()).frames.rot90(-1, (2, 3)))


def test_pictures_are_sampled_by_the_same_rule():
    video = frames_video([picture(index) for index in range(100)], 10.0, settings())
    assert video.frames[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert video.frames.shape == (10, 3, 24, 32) and video.frames.dtype == torch.uint8
    assert video.timestamps.tolist() == list(range(10)) and video.fps == 1.0
    assert len(frames_video([picture(9, kind="JPEG")] * 3, 1.0, settings()).frames) == 2


# --- refused ----------------------------------------------------------------------------------------------------------

def overwrite(data: bytes, after: bytes, skip: int, value: bytes) -> bytes:
    """value in place of what stands skip bytes after the first occurrence of a name."""
    place = data.index(after) + len(after) + skip
    return data[:place] + value + data[place + len(value):]


@pytest.mark.parametrize("data, message", [
    (b"", "cannot be decoded"),
    (b"garbage" * 1000, "cannot be decoded"),
    (b"ffconcat version 1.0\nfile other.mp4\n", "cannot be decoded"),
    (picture(0), "cannot be decoded"),
    (clip("mp4")[:1500], "cannot be decoded"),
    (clip("mp4").replace(b"vide", b"soun"), "no video stream"),
    (clip("gif")[:800], "cut short or damaged"),
    (overwrite(clip("mp4"), b"stsz", 8, bytes(4)), "no frames"),
    (overwrite(clip("gif"), b"GIF89a", 0, struct.pack("<H", 20000)), "20000 x 48 pixels are not within 16384"),
], ids=["empty", "garbage", "script", "picture", "cut mp4", "no video", "cut gif", "no frames", "wide"])
def test_unusable_files(data, message):
    with pytest.raises(VideoError, match=message):
        decode_video(data, settings())


@pytest.mark.parametrize("frames, fps, message", [
    ([], 1.0, "0 frames at 1.0"),
    ([picture(0)], 0.0, "1 frames at 0.0"),
    ([picture(0)], float("nan"), "at nan"),
    ([picture(0), b"garbage"], 1.0, "frame 1 of the video cannot be decoded"),
    ([picture(0), picture(0, width=40)], 1.0, "not of one size: 32 x 24 and 40 x 24 pixels"),
    ([picture(0, width=16385, height=1)], 1.0, "16385 x 1 pixels are not within 16384"),
])
def test_unusable_pictures(frames, fps, message):
    with pytest.raises(VideoError, match=message):
        frames_video(frames, fps, settings())


def test_a_clip_that_would_not_fit_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr("megatron_ral.data.video.MAX_CLIP_BYTES", 3 * 64 * 48 * 4 - 1)
    with pytest.raises(VideoError, match="4 frames of 64 x 48 pixels take more than"):
        decode_video(clip(), settings())


def test_too_thin_frames():
    with pytest.raises(VideoError, match="more than 200 times"):
        patchify_video(noise(2, 2, 402), settings())


@pytest.mark.parametrize("choices", [
    {"family": "qwen4_vl"}, {"fps": 0.0}, {"fps": float("inf")}, {"max_frames": 3}, {"max_frames": 1, "min_frames": 1},
    {"max_pixels_per_frame": 27 * 28, "min_pixels_per_frame": 1}, {"min_pixels_per_frame": 0},
    {"min_pixels_per_frame": 200 * 28 * 28},
])
def test_impossible_settings(choices):
    with pytest.raises(ConfigError, match="video"):
        settings(**choices)


# --- patches and times ------------------------------------------------------------------------------------------------

SIZES = [(1, 28, 28), (2, 56, 84), (5, 100, 130), (4, 10, 60), (3, 400, 300), (6, 20, 3900), (2, 15, 15)]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_are_counted_from_sizes_alone(family, size):
    chosen = settings(family)
    values, grid = patchify_video(noise(*size), chosen)
    assert grid.tolist() == list(video_grid(*size, chosen)) and grid.dtype == torch.int64
    assert values.shape == (grid.prod(), 3 * 2 * chosen.patch_size**2) and values.dtype == torch.float32
    assert visual_token_count(*size, chosen) * chosen.merge_size**2 == len(values)


def test_patches_hold_the_frames_in_order():
    """Without resizing, each patch is a piece of two frames: (token row, token column, row, column) after time."""
    video, chosen = noise(3, 56, 84), settings(min_pixels_per_frame=28 * 28)
    values, grid = patchify_video(video, chosen)
    assert grid.tolist() == [2, 4, 6]
    mean, std = torch.tensor(chosen.image_mean).view(3, 1, 1, 1), torch.tensor(chosen.image_std).view(3, 1, 1, 1)
    for patch, frames, top, left in [(0, [0, 1], 0, 0), (1, [0, 1], 0, 14), (2, [0, 1], 14, 0), (4, [0, 1], 0, 28),
                                     (12, [0, 1], 28, 0), (24 + 7, [2, 2], 14, 42)]:
        piece = video.frames[frames, :, top:top + 14, left:left + 14].transpose(0, 1) / 255
        torch.testing.assert_close(values[patch].view(3, 2, 14, 14), (piece - mean) / std)


def test_times_of_temporal_patches():
    video = DecodedVideo(torch.zeros(3, 3, 28, 28).byte(), torch.tensor([0.0, 1.0, 2.5]), 0.8)
    assert seconds_per_grid(video, settings()) == 2 / 0.8
    assert grid_timestamps(video, settings()) == [0.5, 2.5]


@pytest.mark.parametrize("family, size", [("qwen2_5_vl", size) for size in SIZES]
                         + [("qwen3_vl", size) for size in SIZES if size[0] > 1])  # it refuses a lone frame
def test_patches_equal_the_stock_processors(family, size):
    pytest.importorskip("torchvision")
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    chosen, video = settings(family), noise(*size)
    stock, frames = (Qwen3VLVideoProcessor, size[0]) if family == "qwen3_vl" else (Qwen2VLVideoProcessor, 1)
    limits = {"shortest_edge": frames * chosen.min_pixels_per_frame,
              "longest_edge": frames * chosen.max_pixels_per_frame}
    wanted = stock(size=limits, do_sample_frames=False)(videos=[video.frames], return_tensors="pt")
    values, grid = patchify_video(video, chosen)
    assert grid.tolist() == wanted["video_grid_thw"][0].tolist()
    torch.testing.assert_close(values, wanted["pixel_values_videos"], rtol=0, atol=1e-5)


def test_sampling_equals_the_stock_processor():
    pytest.importorskip("torchvision")
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.video_utils import VideoMetadata

    for total, rate, fps in [(300, 30, 1.0), (301, 29.97, 1.0), (5, 25, 2.0), (9000, 25, 1.0), (1234, 24, 2.0)]:
        chosen = settings(fps=fps)
        wanted = Qwen2VLVideoProcessor().sample_frames(VideoMetadata(total, rate), fps=fps, max_frames=128)
        assert sample_indices(total, total / rate, chosen) == wanted.tolist()
