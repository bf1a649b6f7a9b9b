"""Video -> patches: bytes or pictures -> DecodedVideo -> pixel values and their grid.

The stock video processors of transformers need torchvision, and this module does not. Given the same frames and limits
it makes the same patches (tests/unit/test_video.py compares them where torchvision is installed). An unusable clip
raises SampleError with the reason `broken_video` and without the sample's key, which the caller adds.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_ral.data.issues import SampleError
from megatron_ral.data.pictures import MAX_SIDE, picture_size, read_picture
from megatron_ral.data.video_file import VideoTrack, broken_video, open_track
from megatron_ral.errors import ConfigError
from megatron_ral.functional.patches import cut_frames
from megatron_ral.models.families import FAMILIES, PatchRules
from megatron_ral.types import FramePictures

MAX_CLIP_BYTES = 4 * 2**30
MAX_ASPECT_RATIO = 200
# Some containers tick in milliseconds, and 9.9993 s at one frame per second must still be ten frames.
CLOCK_TOLERANCE = 1e-3


@dataclass(frozen=True)
class VideoSettings:
    """Rules by which a video becomes patches.

    The checkpoint fixes the patches, the normalisation and the family. A run may choose the limits; their defaults are
    those of the paper.

    Raises:
        ConfigError: an unknown family, or limits that no clip can meet.

    Source: RAL (arXiv 2602.04884): 1 frame per second, at most 128 frames, at most 128 * 28 * 28 pixels each.
    """

    patch_size: int
    """Pixels of a patch and side."""
    temporal_patch_size: int
    """Frames of a temporal patch."""
    merge_size: int
    """Patches of a visual token and side."""
    image_mean: tuple[float, ...]
    """Mean of each channel, in [0, 1]."""
    image_std: tuple[float, ...]
    """Standard deviation of each channel, in [0, 1]."""
    family: str = "qwen2_5_vl"
    """Key of `FAMILIES`."""
    frame: tuple[int, ...] = ()
    """Patches of every frame along height and width; empty where they follow from the frame's own size."""
    fps: float = 1.0
    """Frames sampled per second."""
    max_frames: int = 128
    """Most frames of a clip."""
    min_frames: int = 4
    """Least frames of a clip that has as many."""
    max_pixels_per_frame: int = 128 * 28 * 28
    """Most pixels of a resized frame."""
    min_pixels_per_frame: int = 4 * 28 * 28
    """Least pixels of a resized frame."""

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ConfigError("video family", self.family, f"is none of {', '.join(FAMILIES)}")
        frames = max(self.min_frames, self.temporal_patch_size) <= self.max_frames
        pixels = max(self.min_pixels_per_frame, self.token_side**2) <= self.max_pixels_per_frame
        if not (0 < self.fps < math.inf and frames and pixels and self.min_pixels_per_frame > 0):
            raise ConfigError(
                "the video limits",
                None,
                f"cannot be met by any clip: {self.fps} frames per second, {self.min_frames} to "
                f"{self.max_frames} frames in patches of {self.temporal_patch_size}, {self.min_pixels_per_frame} to "
                f"{self.max_pixels_per_frame} pixels per frame in tokens of {self.token_side**2}",
            )

    @classmethod
    def from_checkpoint(cls, rules: PatchRules, processor: Any, **choices: Any) -> "VideoSettings":
        """Return the settings of a checkpoint.

        Args:
            rules: sizes of the checkpoint's patches.
            processor: image processor of the checkpoint, which has the normalisation.
            choices: family and limits that differ from the defaults.
        """
        sizes = rules.patch_size, rules.temporal_patch_size, rules.merge_size
        return cls(*sizes, tuple(processor.image_mean), tuple(processor.image_std), frame=rules.frame, **choices)

    @property
    def token_side(self) -> int:
        """Return the pixels of a visual token and side."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class DecodedVideo:
    """Sampled frames of one clip."""

    frames: Tensor
    """[T, 3, H, W] uint8, in the clip's size."""
    timestamps: Tensor
    """[T] float64 seconds after the clip's first frame at which each is sampled (`sample_track`)."""
    fps: float
    """Sampled frames per second of the clip."""


# --- frames -----------------------------------------------------------------------------------------------------------


def sample_indices(num_frames: int, seconds: float, settings: VideoSettings) -> list[int]:
    """Return the indices of the frames to sample, uniformly spaced.

    Their number is `settings.fps` per second, within `min_frames` and `max_frames`, rounded down to whole temporal
    patches. A clip shorter than one temporal patch gives all its frames.

    Args:
        num_frames: frames of the clip, at least 1.
        seconds: duration of the clip.

    Source: Qwen2VLVideoProcessor.sample_frames of transformers 5.23. It is computed in integers here, because the
    float32 steps there at times give one index past the end.
    """
    patch = settings.temporal_patch_size
    asked = min(max(seconds * settings.fps, settings.min_frames), settings.max_frames, num_frames)
    count = max(math.floor(asked / patch + CLOCK_TOLERANCE) * patch, min(patch, num_frames))
    return [index * num_frames // count for index in range(count)]


def read_clip(video: bytes | FramePictures, settings: VideoSettings, *, measure_only: bool = False) -> DecodedVideo:
    """Return the clip of a sample's video, a file or pictures.

    Args:
        measure_only: only the size of the frames is needed: decode the first sampled frame and repeat it T times.

    Raises:
        SampleError: as in `frames_video` and `decode_video`.
    """
    if isinstance(video, FramePictures):
        return frames_video(video.pictures, video.fps, settings, measure_only=measure_only)
    return decode_video(video, settings, measure_only=measure_only)


def frames_video(
    frames: Sequence[bytes], fps: float, settings: VideoSettings, *, measure_only: bool = False
) -> DecodedVideo:
    """Return the clip of pictures (PNG, JPEG or WebP), of which only the sampled ones are decoded.

    Args:
        frames: encoded pictures in order of time.
        fps: pictures per second.
        measure_only: as in `read_clip`.

    Raises:
        SampleError: no picture, an unusable fps, or a sampled picture that is undecodable, huge or of another size.
    """
    if not frames or not 0 < fps < math.inf:
        raise broken_video(f"a video of {len(frames)} frames at {fps} per second cannot be used")
    seconds = len(frames) / fps
    indices = sample_indices(len(frames), seconds, settings)
    pictures = (_open_picture(frames[index], index, len(indices)) for index in indices)
    return DecodedVideo(
        _stack(pictures, len(indices), measure_only),
        torch.tensor(indices, dtype=torch.float64) / fps,
        len(indices) / seconds,
    )


def decode_video(data: bytes, settings: VideoSettings, *, measure_only: bool = False) -> DecodedVideo:
    """Return the clip of an mp4, webm or gif file; `video_file.py` says which of several video tracks is read.

    The first sampled frame is decoded even to measure the clip, because it says by how much the clip is turned.

    Args:
        data: bytes of the file.
        measure_only: as in `read_clip`.

    Raises:
        SampleError: undecodable, without frames, huge, or of changing size.
    """
    with open_track(data) as track:
        indices, timestamps, seconds = sample_track(track, settings)
        _check_size(track.width, track.height, len(indices))
        pictures = track.frames([track.times[index] for index in indices])
        return DecodedVideo(
            _stack(pictures, len(indices), measure_only),
            torch.tensor(timestamps, dtype=torch.float64),
            len(indices) / seconds,
        )


def sample_track(track: VideoTrack, settings: VideoSettings) -> tuple[list[int], list[float], float]:
    """Return the frames of a track to sample, their times in seconds after its first frame, and its seconds.

    Frames at an even rate, each within half a frame of its place, are chosen by `sample_indices`. Otherwise their
    number is as there, and the frames are those on show at evenly spaced times. A frame's time is its own stamp. Where
    a frame is on show for so long that it is sampled again, the repetition has the time at which it is sampled.

    At an even rate the last frame lasts as long as the others. Otherwise it lasts as long as the one before it, or
    longer where the file says so. A lone frame lasts as long as a sampling interval.
    """
    places, last = [time - track.times[0] for time in track.times], len(track.times) - 1
    if not last:
        return [0], [0.0], 1 / settings.fps
    mean = places[-1] / last
    seconds = places[-1] * track.tick * (1 + 1 / last)
    is_even = all(abs(place - index * mean) < mean / 2 for index, place in enumerate(places))
    if is_even and track.hold <= 1.5 * mean:
        indices = sample_indices(len(places), seconds, settings)
        return indices, [places[index] * track.tick for index in indices], seconds
    seconds = (places[-1] + max(track.hold, places[-1] - places[-2])) * track.tick
    count, starts = len(sample_indices(len(places), seconds, settings)), [place * track.tick for place in places]
    times = [number * seconds / count for number in range(count)]
    indices = [bisect_right(starts, time + CLOCK_TOLERANCE) - 1 for time in times]
    repeated = [number > 0 and index == indices[number - 1] for number, index in enumerate(indices)]
    return indices, [time if again else starts[index] for time, again, index in zip(times, repeated, indices)], seconds


def _open_picture(data: bytes, index: int, count: int) -> Tensor:
    """Return [3, H, W] uint8."""
    what = f"frame {index} of the video"
    try:
        _check_size(*picture_size(data, what), count)
        return torch.from_numpy(np.array(read_picture(data, what))).permute(2, 0, 1)
    except SampleError as error:
        raise broken_video(str(error)) from None


def _check_size(width: int, height: int, count: int) -> None:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise broken_video(f"the video's frames of {width} x {height} pixels are not within {MAX_SIDE} on a side")
    if 3 * width * height * count > MAX_CLIP_BYTES:
        raise broken_video(f"{count} frames of {width} x {height} pixels take more than {MAX_CLIP_BYTES / 2**30:g} GiB")


def _stack(pictures: Iterable[Tensor], count: int, measure_only: bool = False) -> Tensor:
    """Return [T, 3, H, W], filled one picture at a time so that the clip is held in memory once."""
    frames = None
    if measure_only:
        return next(iter(pictures))[None].expand(count, -1, -1, -1)
    for index, picture in enumerate(pictures):
        if frames is None:
            frames = picture.new_empty(count, *picture.shape)
        if picture.shape != frames.shape[1:]:
            sizes = " and ".join(f"{shape[-1]} x {shape[-2]}" for shape in (frames.shape, picture.shape))
            raise broken_video(f"the video's frames are not of one size: {sizes} pixels")
        frames[index] = picture
    assert frames is not None  # a clip has at least one frame
    return frames


# --- patches ----------------------------------------------------------------------------------------------------------


def video_grid(num_frames: int, height: int, width: int, settings: VideoSettings) -> tuple[int, int, int]:
    """Return the patches (t, h, w) of a clip, resized to whole tokens near its aspect ratio and within the limits.

    Only a very thin frame, one token across, may exceed `max_pixels_per_frame`. A family may count the frames and
    pixels in its own way (`Family.counted_size`).

    Args:
        num_frames: sampled frames, at least 1.
        height: pixels of a frame.
        width: pixels of a frame.

    Raises:
        SampleError: one side is more than 200 times the other.

    Source: smart_resize of Qwen2VLVideoProcessor and of Qwen3VLVideoProcessor in transformers 5.23.
    """
    side, patch = settings.token_side, settings.temporal_patch_size
    if settings.frame:
        return math.ceil(num_frames / patch), settings.frame[0], settings.frame[1]
    frames = max(num_frames, patch)
    counted, height, width = FAMILIES[settings.family].counted_size(
        num_frames, height, width, temporal_patch_size=patch, token_side=side
    )
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise broken_video(
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
    """Return the visual tokens of a clip from its sizes alone; arguments and errors as in `video_grid`."""
    return math.prod(video_grid(num_frames, height, width, settings)) // settings.merge_size**2


def patchify_video(video: DecodedVideo, settings: VideoSettings) -> tuple[Tensor, Tensor]:
    """Cut a clip into patches.

    The frames are resized (bicubic, antialiased, in uint8). The last frame is repeated until the temporal patches are
    whole. `video_levels` has the normalised numbers of the bytes.

    Returns:
        pixels: [t * h * w, temporal_patch_size, patch_size**2, 3] uint8; the patches of one visual token are
            neighbours.
        grid_thw: [3] int64 patches (t, h, w).

    Raises:
        SampleError: as in `video_grid`.

    Source: Qwen2VLVideoProcessor and Qwen3VLVideoProcessor in transformers 5.23.
    """
    patch, merge, depth = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    count, _, height, width = video.frames.shape
    t, h, w = video_grid(count, height, width, settings)
    frames = F.interpolate(video.frames, size=(h * patch, w * patch), mode="bicubic", antialias=True)
    if len(frames) < t * depth:
        frames = torch.cat([frames, frames[-1:].expand(t * depth - len(frames), -1, -1, -1)])
    return cut_frames(frames.permute(0, 2, 3, 1).numpy(), depth, patch, merge), torch.tensor([t, h, w])


def video_levels(settings: VideoSettings) -> Tensor:
    """Return the normalised number of each byte of a frame, [3, 256] float32.

    Source: the video processors of transformers 5.23, which scale and normalise in one step.
    """
    mean, std = (255 * torch.tensor(values).view(3, 1) for values in (settings.image_mean, settings.image_std))
    return torch.arange(256).float().sub(mean).div_(std)


def seconds_per_grid(video: DecodedVideo, settings: VideoSettings) -> float:
    """Return the duration of one temporal patch in seconds (`second_per_grid_ts` of Qwen2.5-VL)."""
    return settings.temporal_patch_size / video.fps


def grid_timestamps(video: DecodedVideo, settings: VideoSettings) -> list[float]:
    """Return the time of each temporal patch in seconds: the mean of its first and its last frame."""
    times, patch = video.timestamps.tolist(), settings.temporal_patch_size
    return [(times[start] + times[min(start + patch, len(times)) - 1]) / 2 for start in range(0, len(times), patch)]
