"""Video -> patches for Qwen2.5-VL and Qwen3-VL: bytes or pictures -> DecodedVideo -> pixel values and their grid.

The stock video processors of transformers need torchvision; this does not, and given the same frames and limits its
patches are theirs (tests/unit/test_video.py compares them where torchvision is installed). Nothing here knows of
samples: an unusable clip raises VideoError, and whoever holds the sample's key adds it.
"""

import io
import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from megatron_ral.errors import ConfigError
from megatron_ral.types import FramePictures

if TYPE_CHECKING:
    import av

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
# Only demuxers (mp4, webm and gif with their kin) and picture formats that open no other file and start no program.
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif"
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_SIDE = 16384
MAX_CLIP_BYTES = 4 * 2**30
MAX_ASPECT_RATIO = 200
# Some containers tick in milliseconds, and 9.9993 s at one frame per second must still be ten frames.
CLOCK_TOLERANCE = 1e-3


class VideoError(ValueError):
    """A video that cannot be used."""


@dataclass(frozen=True)
class VideoSettings:
    """What the checkpoint fixes (patches, normalisation) and what a run chooses (limits, by default the paper's).

    Raises:
        ConfigError: an unknown family or limits that no clip can meet.

    Source: RAL (arXiv 2602.04884): 1 frame per second, at most 128 frames, at most 128 * 28 * 28 pixels each.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    family: str = "qwen2_5_vl"
    fps: float = 1.0
    max_frames: int = 128
    min_frames: int = 4
    max_pixels_per_frame: int = 128 * 28 * 28
    min_pixels_per_frame: int = 4 * 28 * 28

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ConfigError(f"video family '{self.family}' is none of {', '.join(FAMILIES)}")
        frames = max(self.min_frames, self.temporal_patch_size) <= self.max_frames
        pixels = max(self.min_pixels_per_frame, self.token_side**2) <= self.max_pixels_per_frame
        if not (0 < self.fps < math.inf and frames and pixels and self.min_pixels_per_frame > 0):
            raise ConfigError(
                f"no clip can meet the video limits: {self.fps} frames per second, {self.min_frames} to "
                f"{self.max_frames} frames in patches of {self.temporal_patch_size}, {self.min_pixels_per_frame} to "
                f"{self.max_pixels_per_frame} pixels per frame in tokens of {self.token_side**2}"
            )

    @classmethod
    def from_image_processor(cls, processor, **choices) -> "VideoSettings":
        """Settings of a checkpoint's own Qwen2VLImageProcessorPil; choices: family and limits unlike the defaults."""
        return cls(
            processor.patch_size,
            processor.temporal_patch_size,
            processor.merge_size,
            tuple(processor.image_mean),
            tuple(processor.image_std),
            **choices,
        )

    @property
    def token_side(self) -> int:
        """Pixels per visual token and side."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class DecodedVideo:
    """Sampled frames of one clip.

    frames: [T, 3, H, W] uint8, in the clip's size.
    timestamps: [T] float64 seconds after the clip's first frame.
    fps: sampled frames per second of the clip.
    """

    frames: Tensor
    timestamps: Tensor
    fps: float


# --- frames -----------------------------------------------------------------------------------------------------------


def sample_indices(num_frames: int, seconds: float, settings: VideoSettings) -> list[int]:
    """Frames to take of a clip of num_frames >= 1: uniformly spaced, settings.fps of them per second within min_frames
    and max_frames, rounded down to whole temporal patches. A clip of less than one temporal patch gives all it has.

    Source: Qwen2VLVideoProcessor.sample_frames of transformers 5.23, in integers; its float32 steps at times give one
    index past the end.
    """
    patch = settings.temporal_patch_size
    asked = min(max(seconds * settings.fps, settings.min_frames), settings.max_frames, num_frames)
    count = max(math.floor(asked / patch + CLOCK_TOLERANCE) * patch, min(patch, num_frames))
    return [index * num_frames // count for index in range(count)]


def read_clip(video: bytes | FramePictures, settings: VideoSettings, *, measure_only: bool = False) -> DecodedVideo:
    """Clip of a sample's video, whichever form it has; measure_only and errors as in frames_video and decode_video."""
    if isinstance(video, FramePictures):
        return frames_video(video.pictures, video.fps, settings, measure_only=measure_only)
    return decode_video(video, settings, measure_only=measure_only)


def frames_video(
    frames: Sequence[bytes], fps: float, settings: VideoSettings, *, measure_only: bool = False
) -> DecodedVideo:
    """Clip of pictures (PNG, JPEG or WebP) in order of time, fps of them per second; only sampled ones are decoded, with
    measure_only the first of them alone, in the place of all.

    Raises:
        VideoError: no picture, an unusable fps, or a sampled picture that is undecodable, huge or of another size.
    """
    if not frames or not 0 < fps < math.inf:
        raise VideoError(f"a video of {len(frames)} frames at {fps} per second cannot be used")
    seconds = len(frames) / fps
    indices = sample_indices(len(frames), seconds, settings)
    pictures = (_open_picture(frames[index], index, len(indices)) for index in indices)
    return DecodedVideo(
        _stack(pictures, len(indices), measure_only),
        torch.tensor(indices, dtype=torch.float64) / fps,
        len(indices) / seconds,
    )


def decode_video(data: bytes, settings: VideoSettings, *, measure_only: bool = False) -> DecodedVideo:
    """Clip of an mp4, webm or gif file's bytes. How many frames it has, and when, is read from its packets: headers may
    have no duration, or a wrong one. Only what lies between a keyframe and a sampled frame is decoded, with measure_only
    the first sampled frame alone (whether a clip is turned stands there), in the place of all.

    Raises:
        VideoError: undecodable, without frames, huge, or of changing size.
    """
    import av

    try:
        with av.open(io.BytesIO(data), metadata_errors="replace", options={"format_whitelist": DEMUXERS}) as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise VideoError("the file has no video stream that can be decoded")
            packets = [packet for packet in container.demux(stream) if packet.size and packet.pts is not None]
            times = sorted({packet.pts for packet in packets if not packet.is_discard})
            if not times:
                raise VideoError("the video has no frames")
            tick, last = float(stream.time_base), len(times) - 1
            # the last frame lasts as long as the others in the mean, a lone one as long as a sampling interval
            seconds = (times[-1] - times[0]) * tick * (1 + 1 / last) if last else 1 / settings.fps
            wanted = [times[index] for index in sample_indices(len(times), seconds, settings)]
            _check_size(stream.width, stream.height, len(wanted))
            pictures = map(_to_picture, _frames_at(wanted, packets, stream.codec_context))
            return DecodedVideo(
                _stack(pictures, len(wanted), measure_only),
                (torch.tensor(wanted) - times[0]).double() * tick,
                len(wanted) / seconds,
            )
    except av.error.FFmpegError as error:
        raise VideoError(f"the video cannot be decoded ({error.strerror})") from None


def _frames_at(
    wanted: list[int], packets: list["av.Packet"], decoder: "av.VideoCodecContext"
) -> Iterator["av.VideoFrame"]:
    """The frame shown at each wanted time (ascending, in ticks), decoded from the keyframe before it unless decoding
    has already come further."""
    keyframes = [index for index, packet in enumerate(packets) if packet.is_keyframe or not index]
    place = {packet.pts: index for index, packet in enumerate(packets)}
    reached, frame, decoded = -1, None, iter(())
    for time in wanted:
        nearest = bisect_right(keyframes, place[time]) - 1
        if nearest and time < packets[keyframes[nearest]].pts:  # shown before the keyframe it follows in the file
            nearest -= 1
        if keyframes[nearest] > reached:
            decoded = _decode_from(keyframes[nearest], packets, decoder, set(wanted))
        while frame is None or frame.pts < time:
            reached, frame = next(decoded, (len(packets), None))
            if frame is None:
                raise VideoError("the video cannot be decoded to its end; it is cut short or damaged")
        yield frame


def _decode_from(
    start: int, packets: list["av.Packet"], decoder: "av.VideoCodecContext", wanted: set[int]
) -> Iterator[tuple[int, "av.VideoFrame"]]:
    """(packet reached, frame) from a keyframe on, passing over frames neither wanted nor referred to."""
    decoder.flush_buffers()
    for index in range(start, len(packets)):
        decoder.skip_frame = "DEFAULT" if packets[index].pts in wanted else "NONREF"
        for frame in decoder.decode(packets[index]):
            yield index, frame
    for frame in decoder.decode(None):
        yield len(packets), frame


def _to_picture(frame: "av.VideoFrame") -> Tensor:
    """[3, H, W] uint8, turned the way the file says it is to be shown (phones write such files)."""
    picture = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    return torch.rot90(picture, round(frame.rotation / 90), (1, 2))


def _open_picture(data: bytes, index: int, count: int) -> Tensor:
    """[3, H, W] uint8."""
    try:
        image = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
        _check_size(*image.size, count)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except VideoError:
        raise
    except Exception as error:  # PIL raises many types; each of them means this one picture is unusable
        raise VideoError(f"frame {index} of the video cannot be decoded ({error})") from None


def _check_size(width: int, height: int, count: int) -> None:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise VideoError(f"the video's frames of {width} x {height} pixels are not within {MAX_SIDE} on a side")
    if 3 * width * height * count > MAX_CLIP_BYTES:
        raise VideoError(f"{count} frames of {width} x {height} pixels take more than {MAX_CLIP_BYTES / 2**30:g} GiB")


def _stack(pictures: Iterable[Tensor], count: int, measure_only: bool = False) -> Tensor:
    """[T, 3, H, W], filled one picture at a time so that the clip is held once; measure_only: the first, T times."""
    frames = None
    if measure_only:
        return next(iter(pictures))[None].expand(count, -1, -1, -1)
    for index, picture in enumerate(pictures):
        if frames is None:
            frames = picture.new_empty(count, *picture.shape)
        if picture.shape != frames.shape[1:]:
            sizes = " and ".join(f"{shape[-1]} x {shape[-2]}" for shape in (frames.shape, picture.shape))
            raise VideoError(f"the video's frames are not of one size: {sizes} pixels")
        frames[index] = picture
    return frames


# --- patches ----------------------------------------------------------------------------------------------------------


def video_grid(num_frames: int, height: int, width: int, settings: VideoSettings) -> tuple[int, int, int]:
    """Patches (t, h, w) of num_frames >= 1 sampled frames of height x width pixels, resized to whole tokens near their
    aspect ratio and within the limits; only a very thin frame, one token across, may exceed max_pixels_per_frame.

    Qwen3-VL limits the pixels of the whole clip, here those of a frame times the frames, and first enlarges a frame
    smaller than a token.

    Raises:
        VideoError: one side is more than 200 times the other.

    Source: smart_resize of Qwen2VLVideoProcessor and of Qwen3VLVideoProcessor in transformers 5.23.
    """
    side, patch = settings.token_side, settings.temporal_patch_size
    frames = counted = max(num_frames, patch)
    if settings.family == "qwen3_vl":
        counted = round(frames / patch) * patch
        if (small := min(height, width)) < side:
            height, width = int(height * (side / small)), int(width * (side / small))
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise VideoError(
            f"the video's frames of {width} x {height} pixels are too thin: one side is more than "
            f"{MAX_ASPECT_RATIO} times the other"
        )
    rows, columns = round(height / side), round(width / side)
    pixels = counted * rows * columns * side**2
    if pixels > frames * settings.max_pixels_per_frame:
        shrink = math.sqrt(height * width / settings.max_pixels_per_frame)
        rows, columns = (max(1, math.floor(length / shrink / side)) for length in (height, width))
    elif pixels < frames * settings.min_pixels_per_frame:
        grow = math.sqrt(settings.min_pixels_per_frame / (height * width))
        rows, columns = (math.ceil(length * grow / side) for length in (height, width))
    return math.ceil(num_frames / patch), rows * settings.merge_size, columns * settings.merge_size


def visual_token_count(num_frames: int, height: int, width: int, settings: VideoSettings) -> int:
    """Visual tokens of a clip from its sizes alone; arguments and error as in video_grid."""
    return math.prod(video_grid(num_frames, height, width, settings)) // settings.merge_size**2


def patchify_video(video: DecodedVideo, settings: VideoSettings) -> tuple[Tensor, Tensor]:
    """Resize (bicubic, antialiased, in uint8), normalise, repeat the last frame to whole temporal patches, cut. Error
    as in video_grid.

    Returns:
        pixel_values_videos: [t * h * w, 3 * temporal_patch_size * patch_size**2] float32; the patches of one visual
            token are neighbours.
        grid_thw: [3] int64 patches (t, h, w).

    Source: Qwen2VLVideoProcessor and Qwen3VLVideoProcessor in transformers 5.23.
    """
    patch, merge, depth = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    t, h, w = video_grid(len(video.frames), *video.frames.shape[2:], settings)
    frames = F.interpolate(video.frames, size=(h * patch, w * patch), mode="bicubic", antialias=True)
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (settings.image_mean, settings.image_std))
    frames = frames.float().sub_(mean).div_(std)
    frames = torch.cat([frames, frames[-1:].expand(t * depth - len(frames), -1, -1, -1)])
    cut = frames.view(t, depth, 3, h // merge, merge, patch, w // merge, merge, patch)
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1), torch.tensor([t, h, w])


def seconds_per_grid(video: DecodedVideo, settings: VideoSettings) -> float:
    """Seconds one temporal patch stands for: Qwen2.5-VL's second_per_grid_ts."""
    return settings.temporal_patch_size / video.fps


def grid_timestamps(video: DecodedVideo, settings: VideoSettings) -> list[float]:
    """Seconds of each temporal patch, the mean of its first and last frame; Qwen3-VL writes them into the prompt."""
    times, patch = video.timestamps.tolist(), settings.temporal_patch_size
    return [(times[start] + times[min(start + patch, len(times)) - 1]) / 2 for start in range(0, len(times), patch)]
