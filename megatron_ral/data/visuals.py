"""Images and videos of a sample -> patches, grids and target tokens."""

import math
from dataclasses import dataclass
from typing import Any, Optional

import torch
from PIL import Image
from torch import Tensor

from megatron_ral.data.issues import SampleError
from megatron_ral.data.pictures import picture_size, read_picture
from megatron_ral.data.targets import clip_cells, image_cells
from megatron_ral.data.video import (
    VideoSettings,
    grid_timestamps,
    patchify_video,
    read_clip,
    seconds_per_grid,
    video_grid,
    video_levels,
)
from megatron_ral.functional.patches import image_levels
from megatron_ral.models.families import Family, PatchRules
from megatron_ral.types import FramePictures, Patches, Sample


@dataclass
class Visual:
    """One image or video of a sample."""

    patches: Optional[Patches]
    """Patches in the order of visual tokens; None if only lengths are measured."""
    grid: Tensor
    """[3] int64 patches (t, h, w)."""
    targets: Tensor
    """[visual tokens] bool: tokens that show the object asked for."""
    is_video: bool = False
    """Kind of the visual: video or image."""
    seconds: float = 0.0
    """Duration of one temporal patch of a video; 0 for an image."""
    stamps: tuple[float, ...] = ()
    """Seconds of each temporal patch of a video after its first frame; empty for an image."""


class VisualReader:
    """Reader of images and videos for one checkpoint. Several threads may call it.

    Args:
        image_processor: image processor of the checkpoint.
        family: family of the checkpoint.
        rules: sizes of the patches that the vision tower takes.
    """

    def __init__(self, image_processor: Any, family: Family, rules: PatchRules):
        self.image_processor, self.family, self.rules = image_processor, family, rules
        self.video = VideoSettings.from_checkpoint(rules, image_processor, family=family.model_type)
        self._image_levels, self._video_levels = image_levels(image_processor), video_levels(self.video)

    def read(self, sample: Sample, *, measure_only: bool = False) -> list[Visual]:
        """Return the images of a sample, then its videos.

        Args:
            measure_only: only grids are needed: read the headers of pictures, the packets of videos and one frame of
                each video.

        Raises:
            SampleError: an image or video that cannot be used, or targets that do not fit it.
        """
        _refuse_stray_targets(sample)
        try:
            visuals = []
            for number, data in enumerate(sample.images):
                what = f"image {number}" if len(sample.images) > 1 else "image"
                picture = picture_size(data, what) if measure_only else read_picture(data, what)
                visual = self._image(picture)
                if sample.target_boxes and number == 0:
                    size = picture if isinstance(picture, tuple) else picture.size
                    for view in self.family.picture_views(self.token_grid(visual.grid), self.rules.token_side, *size):
                        rows, columns = view.tokens.shape
                        visual.targets[view.tokens] = image_cells(sample.target_boxes, *size, rows, columns)
                visuals.append(visual)
            for number, video in enumerate(sample.videos):
                visuals.append(self._video(video, sample.target_frames if number == 0 else (), measure_only))
        except SampleError as error:
            raise error.of_sample(sample.key) from None
        return visuals

    def token_grid(self, grid: Tensor) -> tuple[int, int, int]:
        """Return the visual tokens (t, rows, columns) of patches (t, h, w)."""
        t, h, w = grid.tolist()
        return t, h // self.rules.merge_size, w // self.rules.merge_size

    def run_grids(self, visual: Visual) -> Tensor:
        """Return the grid of each run of visual tokens in the prompt, [runs, 3] int64 patches."""
        if visual.is_video and self.family.timed_video:
            return visual.grid.new_tensor([[1, *visual.grid[1:]]] * len(visual.stamps))
        return visual.grid[None]

    def _no_targets(self, grid: Tensor) -> Tensor:
        return torch.zeros(math.prod(grid.tolist()) // self.rules.merge_size**2, dtype=torch.bool)

    def _image(self, picture: Image.Image | tuple[int, int]) -> Visual:
        """Return the visual of a picture, or that of its width and height alone, without pixels."""
        try:
            if isinstance(picture, tuple):
                patches, grid = None, self.family.image_grid(*picture, self.image_processor, self.rules)
            else:
                pixels, grid = self.family.patchify_image(picture, self.image_processor, self.rules)
                patches = Patches(pixels, self._image_levels, self.rules.temporal_patch_size)
        except ValueError as error:  # an aspect ratio that the processor refuses
            raise SampleError(f"image cannot be used ({error})", "broken_image") from None
        return Visual(patches, grid, self._no_targets(grid))

    def _video(self, video: bytes | FramePictures, target_frames: tuple, measure_only: bool) -> Visual:
        clip = read_clip(video, self.video, measure_only=measure_only)
        if measure_only:
            count, _, height, width = clip.frames.shape
            patches, grid = None, torch.tensor(video_grid(count, height, width, self.video))
        else:
            pixels, grid = patchify_video(clip, self.video)
            patches = Patches(pixels, self._video_levels)
        targets = self._no_targets(grid)
        if target_frames:
            depth = self.video.temporal_patch_size
            targets = clip_cells(target_frames, clip, self.token_grid(grid), depth).flatten()
        stamps = tuple(grid_timestamps(clip, self.video))
        return Visual(patches, grid, targets, True, seconds_per_grid(clip, self.video), stamps)


def _refuse_stray_targets(sample: Sample) -> None:
    """Raise SampleError for targets without an image or video that they could lie in."""
    for boxes, media, field, kind, way in (
        (sample.target_boxes, sample.images, "target_boxes", "image", "a video has target_frames"),
        (sample.target_frames, sample.videos, "target_frames", "video", "an image has target_boxes"),
    ):
        if boxes and not media:
            raise SampleError(
                f"sample '{sample.key}' has {field} but no {kind} they could lie in ({way})", "target_box"
            )
