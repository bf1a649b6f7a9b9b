"""Videos: sampled frames, refusals, and patches equal to those of the stock processors of transformers."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megatron_ral.data.issues import SampleError
from megatron_ral.data.video import (
    DecodedVideo,
    VideoSettings,
    decode_video,
    frames_video,
    grid_timestamps,
    patchify_video,
    sample_indices,
    seconds_per_grid,
    video_grid,
    video_levels,
    visual_token_count,
)
from megatron_ral.errors import ConfigError
from megatron_ral.models.families import FAMILIES, PatchRules
from megatron_ral.types import Patches

CODECS = {  # short groups of pictures, so that decoding skips some
    "mp4": ("mp4", "libx264", "yuv420p", {"g": "6", "bf": "2"}),
    "open groups": ("matroska", "libx264", "yuv420p", {"g": "6", "bf": "2", "x264-params": "open-gop=1"}),
    "mpeg4": ("mp4", "mpeg4", "yuv420p", {"g": "6", "bf": "2"}),
    "webm": ("webm", "libvpx-vp9", "yuv420p", {"g": "6"}),
    "gif": ("gif", "gif", "rgb8", {}),
}


def settings(family="qwen2_5_vl", **choices) -> VideoSettings:
    stock = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3} if family == "qwen3_vl" else {}
    processor = Qwen2VLImageProcessorPil(**stock)
    rules = PatchRules(processor.patch_size, processor.temporal_patch_size, processor.merge_size)
    return VideoSettings.from_checkpoint(rules, processor, family=family, **choices)


def patches_of(video: DecodedVideo, chosen: VideoSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised patches and their grid."""
    pixels, grid = patchify_video(video, chosen)
    return Patches(pixels, video_levels(chosen)).values(), grid


def clip(kind="mp4", count=20, times=None) -> bytes:
    """Return a clip of 64 x 48 pixels, ten frames per second (or at `times`, in tenths), each frame another ramp."""
    container, codec, pixels, options = CODECS[kind]
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        stream.codec_context.time_base = Fraction(1, 10)
        for index in range(count):
            ramp = (np.arange(64) * 4 + np.arange(48)[:, None] * 2 + index * 11) % 256
            frame = av.VideoFrame.from_ndarray(np.repeat(ramp[..., None], 3, 2).astype(np.uint8), format="rgb24")
            frame.pts = times[index] if times else index
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def all_frames(data: bytes) -> torch.Tensor:
    with av.open(io.BytesIO(data)) as container:
        return torch.stack(
            [torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1) for frame in container.decode(video=0)]
        )


def overwrite(data: bytes, after: bytes, skip: int, value: bytes) -> bytes:
    """Return the data with `value` written `skip` bytes after the first occurrence of a name."""
    place = data.index(after) + len(after) + skip
    return data[:place] + value + data[place + len(value) :]


def picture(level: int, width=32, height=24, kind="PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (level, 0, 0)).save(file, kind)
    return file.getvalue()


def noise(num_frames, height, width) -> DecodedVideo:
    frames = torch.randint(0, 256, (num_frames, 3, height, width), generator=torch.manual_seed(0)).byte()
    return DecodedVideo(frames, torch.arange(num_frames).double(), 1.0)


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_frames, seconds, choices, wanted",
    [
        (100, 10.0, {}, [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]),
        (100, 9.9993, {}, [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]),  # a clock of milliseconds
        (100, 9.5, {}, [0, 12, 25, 37, 50, 62, 75, 87]),  # whole temporal patches
        (100, 1.0, {}, [0, 25, 50, 75]),  # min_frames
        (100, 10.0, {"max_frames": 5}, [0, 25, 50, 75]),  # max_frames
        (100, 3.0, {"fps": 2.0}, [0, 16, 33, 50, 66, 83]),
        (3, 60.0, {}, [0, 1]),
        (1, 60.0, {}, [0]),
    ],
)
def test_sampled_indices(num_frames, seconds, choices, wanted):
    assert sample_indices(num_frames, seconds, settings(**choices)) == wanted


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("choices", [{"fps": 2.0}, {"fps": 4.0}, {"fps": 100.0}, {"max_frames": 2, "min_frames": 2}])
def test_sampled_frames_are_those_of_a_full_decoding(kind, choices):
    data = clip(kind)
    video = decode_video(data, settings(**choices))
    indices = sample_indices(20, 2.0, settings(**choices))
    assert torch.equal(video.frames, all_frames(data)[indices])
    torch.testing.assert_close(video.timestamps, torch.tensor(indices).double() / 10)
    assert video.fps == pytest.approx(len(indices) / 2.0)


def test_what_no_sampled_frame_needs_is_not_decoded():
    data = clip("mpeg4", count=42)
    with av.open(io.BytesIO(data)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    damaged = bytearray(data)
    for packet in packets:
        if 0.7 < packet.pts * packet.time_base < 1.5:
            damaged[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    few = settings(min_frames=2, max_frames=2)  # frames 0 and 21 of 42
    assert torch.equal(decode_video(bytes(damaged), few).frames, decode_video(data, few).frames)
    with pytest.raises(SampleError, match="cannot be decoded"):
        decode_video(bytes(damaged), settings(fps=100.0))


def test_frames_that_an_edit_list_cuts_off_are_not_counted():
    data = overwrite(clip("mp4"), b"elst", 12, struct.pack(">i", 5 * 1024))  # three frames later than it was
    assert len(all_frames(data)) == 17
    video = decode_video(data, settings(fps=100.0))
    assert torch.equal(video.frames, all_frames(data)[sample_indices(17, 1.7, settings(fps=100.0))])
    assert video.timestamps[0] == 0.0


def test_text_that_is_no_utf8_does_not_matter():
    assert len(decode_video(clip("mp4").replace(b"Lavf", b"\xff\xfe\xfd\xfc"), settings()).frames) == 4


def test_times_are_those_of_the_packets():
    """A clip with a pause: four samples of 4.4 seconds; the frame of 0.3 s is on show until 4.0 s."""
    data = clip("webm", count=8, times=[0, 1, 2, 3, 40, 41, 42, 43])
    video = decode_video(data, settings(max_frames=4))
    assert torch.equal(video.frames, all_frames(data)[[0, 3, 3, 3]])
    torch.testing.assert_close(video.timestamps, torch.tensor([0, 0.3, 2.2, 3.3], dtype=torch.float64))
    assert video.fps == pytest.approx(4 / 4.4)


def test_a_wrong_duration_in_the_header_is_not_believed():
    data = clip("webm")
    broken = overwrite(data, b"\x44\x89\x88", 0, struct.pack(">d", float("nan")))
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


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "cannot be decoded"),
        (b"garbage" * 1000, "cannot be decoded"),
        (b"ffconcat version 1.0\nfile other.mp4\n", "cannot be decoded"),
        (picture(0), "cannot be decoded"),
        (clip("mp4")[:1500], "is cut short: it is an mp4 or mov video, and ends before"),
        (clip("mp4").replace(b"vide", b"soun"), "no video stream"),
        (clip("mp4").replace(b"avc1", b"zzzz"), "no video stream"),
        (clip("gif")[:800], "cut short or damaged"),
        (overwrite(clip("mp4"), b"stsz", 8, bytes(4)), "no frames"),
        (overwrite(clip("gif"), b"GIF89a", 0, struct.pack("<H", 20000)), "20000 x 48 pixels are not within 16384"),
        (
            overwrite(clip("gif"), b"GIF89a", 0, struct.pack("<2H", 9000, 9000)),
            "20 frames of 9000 x 9000 pixels take more",
        ),
    ],
    ids=[
        "empty",
        "garbage",
        "script",
        "picture",
        "cut mp4",
        "no video",
        "unknown codec",
        "cut gif",
        "no frames",
        "wide",
        "large",
    ],
)
def test_unusable_files(data, message):
    with pytest.raises(SampleError, match=message):
        decode_video(data, settings(fps=100.0))


@pytest.mark.parametrize(
    "frames, fps, message",
    [
        ([], 1.0, "0 frames at 1.0"),
        ([picture(0)], 0.0, "1 frames at 0.0"),
        ([picture(0)], float("nan"), "at nan"),
        ([picture(0), b"garbage"], 1.0, "frame 1 of the video cannot be decoded"),
        ([picture(0, kind="TIFF")], 1.0, "frame 0 of the video cannot be decoded"),
        ([picture(0), picture(0, width=40)], 1.0, "not of one size: 32 x 24 and 40 x 24 pixels"),
        ([picture(0, width=16385, height=1)], 1.0, "too many pixels .16385 x 1 pixels.; at most 16384"),
    ],
)
def test_unusable_pictures(frames, fps, message):
    with pytest.raises(SampleError, match=message):
        frames_video(frames, fps, settings())


def test_too_thin_frames():
    with pytest.raises(SampleError, match="more than 200 times"):
        patchify_video(noise(2, 2, 402), settings())


@pytest.mark.parametrize(
    "choices",
    [
        {"family": "qwen4_vl"},
        {"fps": 0.0},
        {"fps": float("inf")},
        {"max_frames": 3},
        {"max_frames": 1, "min_frames": 1},
        {"max_pixels_per_frame": 27 * 28, "min_pixels_per_frame": 1},
        {"min_pixels_per_frame": 0},
        {"min_pixels_per_frame": 200 * 28 * 28},
    ],
)
def test_impossible_settings(choices):
    with pytest.raises(ConfigError, match="video"):
        settings(**choices)


# --- patches and times ------------------------------------------------------------------------------------------------

SIZES = {  # (frames, height, width): tokens (t, rows, columns) of Qwen2.5-VL and of Qwen3-VL
    (1, 28, 28): ((1, 2, 2), (1, 2, 2)),
    (2, 56, 84): ((1, 2, 3), (1, 2, 3)),
    (5, 100, 130): ((3, 4, 5), (3, 3, 4)),
    (4, 10, 60): ((2, 1, 5), (2, 1, 6)),
    (3, 400, 300): ((2, 13, 9), (2, 11, 8)),
    (6, 20, 3900): ((3, 1, 157), (3, 1, 138)),
    (2, 15, 15): ((1, 2, 2), (1, 2, 2)),
    (5, 320, 384): ((3, 10, 12), (3, 10, 12)),
    (2, 10, 1000): ((1, 1, 20), (1, 1, 98)),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_are_counted_from_sizes_alone(size):
    for family, (t, rows, columns) in zip(FAMILIES, SIZES[size]):
        chosen = settings(family)
        values, grid = patches_of(noise(*size), chosen)
        assert grid.tolist() == [t, 2 * rows, 2 * columns] and grid.dtype == torch.int64
        assert values.shape == (grid.prod(), 3 * 2 * chosen.patch_size**2) and values.dtype == torch.float32
        assert visual_token_count(*size, chosen) == t * rows * columns


def test_qwen3_vl_limits_the_pixels_of_the_clip():
    """320 x 384 pixels are more than a frame may have; five frames count as four, one as a whole temporal patch."""
    whole, shrunk = (20, 24), (18, 20)
    for num_frames, wanted in [(1, shrunk), (2, shrunk), (4, shrunk), (5, whole), (7, shrunk)]:
        assert video_grid(num_frames, 320, 384, settings("qwen3_vl"))[1:] == wanted


def test_patches_hold_the_frames_in_order():
    """Without resizing, each patch is cut out of two frames: (token row, token column, row, column) after time."""
    video, chosen = noise(3, 56, 84), settings(min_pixels_per_frame=28 * 28)
    values, grid = patches_of(video, chosen)
    assert grid.tolist() == [2, 4, 6]
    mean, std = torch.tensor(chosen.image_mean).view(3, 1, 1, 1), torch.tensor(chosen.image_std).view(3, 1, 1, 1)
    for patch, frames, top, left in [
        (0, [0, 1], 0, 0),
        (1, [0, 1], 0, 14),
        (2, [0, 1], 14, 0),
        (4, [0, 1], 0, 28),
        (12, [0, 1], 28, 0),
        (24 + 7, [2, 2], 14, 42),
    ]:
        piece = video.frames[frames, :, top : top + 14, left : left + 14].transpose(0, 1) / 255
        torch.testing.assert_close(values[patch].view(3, 2, 14, 14), (piece - mean) / std)


def test_resizing_is_bicubic_and_antialiased():
    """The frames equal those that PIL resizes, up to the rounding of a level."""
    video, chosen = noise(2, 300, 400), settings(max_pixels_per_frame=28 * 28, min_pixels_per_frame=1)
    values, grid = patches_of(video, chosen)
    assert grid.tolist() == [1, 2, 2]
    token = values.view(2, 2, 3, 2, 14, 14)[:, :, :, 0].permute(0, 3, 1, 4, 2).reshape(28, 28, 3)
    levels = 255 * (token * torch.tensor(chosen.image_std) + torch.tensor(chosen.image_mean))
    image = Image.fromarray(video.frames[0].permute(1, 2, 0).numpy()).resize((28, 28), Image.Resampling.BICUBIC)
    assert (levels - torch.from_numpy(np.array(image))).abs().max() < 1.01


def test_times_of_temporal_patches():
    video = DecodedVideo(torch.zeros(3, 3, 28, 28).byte(), torch.tensor([0.0, 1.0, 2.5]), 0.8)
    assert seconds_per_grid(video, settings()) == 2 / 0.8
    assert grid_timestamps(video, settings()) == [0.5, 2.5]


@pytest.mark.parametrize(
    "family, size", [("qwen2_5_vl", size) for size in SIZES] + [("qwen3_vl", size) for size in SIZES if size[0] > 1]
)  # it refuses a lone frame
def test_patches_equal_the_stock_processors(family, size):
    pytest.importorskip("torchvision")
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    chosen, video = settings(family), noise(*size)
    stock, frames = (Qwen3VLVideoProcessor, size[0]) if family == "qwen3_vl" else (Qwen2VLVideoProcessor, 1)
    limits = {
        "shortest_edge": frames * chosen.min_pixels_per_frame,
        "longest_edge": frames * chosen.max_pixels_per_frame,
    }
    wanted = stock(size=limits, do_sample_frames=False)(videos=[video.frames], return_tensors="pt")
    values, grid = patches_of(video, chosen)
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
