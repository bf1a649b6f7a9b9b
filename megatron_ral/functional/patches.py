"""RGB pixels -> patches in the order of visual tokens, and back.

`patchify_image` makes the numbers of Hugging Face's Qwen2VLImageProcessorPil, bit for bit, in a fifth of its time.
Departure from it: pixels are put in the order of patches while they are bytes, and each is converted to float once
instead of once per temporal copy.
"""

from typing import Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize


def cut_frames(frames: Tensor, depth: int, patch: int, merge: int) -> Tensor:
    """Cut frames into patches. The patches of one visual token are neighbours.

    Args:
        frames: [t * depth, channels, H, W], H and W whole visual tokens.
        depth: frames of one temporal patch.
        patch: pixels of a patch and side.
        merge: patches of a visual token and side.

    Returns:
        [t * h * w, channels * depth * patch * patch] with h and w patches along H and W.
    """
    channels, height, width = frames.shape[1:]
    h, w = height // patch // merge, width // patch // merge
    cut = frames.reshape(-1, depth, channels, h, merge, patch, w, merge, patch)
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(len(cut) * h * w * merge**2, -1)


def join_frames(patches: Tensor, frame: tuple[int, int], depth: int, patch: int, merge: int) -> Tensor:
    """Return the frames that `cut_frames` has cut, [t * depth, channels, H, W].

    Args:
        patches: [t * h * w, channels * depth * patch * patch].
        frame: (h, w) patches of a frame.
        depth: as in `cut_frames`.
        patch: as in `cut_frames`.
        merge: as in `cut_frames`.
    """
    h, w = frame[0] // merge, frame[1] // merge
    cut = patches.reshape(-1, h, w, merge, merge, patches.shape[1] // (depth * patch**2), depth, patch, patch)
    whole = cut.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    return whole.reshape(-1, cut.shape[5], frame[0] * patch, frame[1] * patch)


def patchify_image(image: Image.Image, processor: Qwen2VLImageProcessorPil) -> tuple[Tensor, Tensor]:
    """Resize a picture, normalise it, repeat it to one temporal patch and cut it into patches.

    Args:
        image: RGB picture.
        processor: image processor of the checkpoint. It does the work itself if its settings leave out a step.

    Returns:
        pixel_values: [h * w, 3 * temporal_patch_size * patch_size**2] float32; the patches of one visual token are
            neighbours.
        grid_thw: [3] int64 patches (1, h, w).

    Raises:
        ValueError: one side is more than 200 times the other.

    Source: Qwen2VLImageProcessorPil of transformers 5.23.
    """
    if not (processor.do_resize and processor.do_rescale and processor.do_normalize):
        features = processor(images=[image], return_tensors="pt")
        return features["pixel_values"], features["image_grid_thw"][0]
    patch, merge, depth = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    grid = image_grid(*image.size, processor)
    h, w = grid[1:].tolist()
    image = image.resize((w * patch, h * patch), resample=processor.resample)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    cut = pixels.view(h // merge, merge, patch, w // merge, merge, patch, 3).permute(0, 3, 1, 4, 6, 2, 5)
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (processor.image_mean, processor.image_std))
    # float64, because the stock processor scales in it
    values = (cut.reshape(h * w, 3, 1, patch, patch).double() * processor.rescale_factor).float().sub_(mean).div_(std)
    return values.expand(-1, -1, depth, -1, -1).reshape(h * w, -1), grid


def image_grid(width: int, height: int, processor: Qwen2VLImageProcessorPil) -> Tensor:
    """Return the grid that `patchify_image` makes of a picture of so many pixels.

    Returns:
        [3] int64 patches (1, h, w).

    Raises:
        ValueError: as in `patchify_image`.
    """
    if processor.do_resize:
        height, width = smart_resize(
            height,
            width,
            factor=processor.patch_size * processor.merge_size,
            min_pixels=processor.size["shortest_edge"],
            max_pixels=processor.size["longest_edge"],
        )
    return torch.tensor([1, height // processor.patch_size, width // processor.patch_size])


def byte_patches(patches: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return the bytes of which patches were made, the exact inverse of scaling by 1/255 and normalising.

    Bytes are 1 / (255 std) apart after normalising, which is 10^5 times the rounding of float32, so that each value
    has one byte. A value between two bytes was made by something else.

    Args:
        patches: [patches, channels * numbers of a channel] float32, normalised.
        mean: mean of each channel, of pixels between 0 and 1.
        std: standard deviation of each channel.

    Returns:
        [patches, channels * numbers of a channel] uint8.

    Raises:
        ValueError: the values are no normalised bytes.
    """
    channels = patches.reshape(len(patches), len(mean), patches.shape[1] // len(mean)).double()
    values = 255 * (channels * torch.tensor(std).double()[:, None] + torch.tensor(mean).double()[:, None])
    rounded = values.round()
    if len(patches) and not (
        float((values - rounded).abs().max()) < 0.01 and 0 <= rounded.min() <= rounded.max() < 256
    ):
        raise ValueError("patches that are no normalised bytes")
    return rounded.to(torch.uint8).view(patches.shape)
