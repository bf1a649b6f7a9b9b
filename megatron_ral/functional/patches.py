"""RGB pixels -> patches in the order of visual tokens, and back.

`patchify_image` and `image_levels` make the numbers of Hugging Face's Qwen2VLImageProcessorPil, bit for bit. Departure
from it: patches stay bytes, and the number of each of the 256 bytes is computed once for a checkpoint. The stock
processor computes each number of each picture, in float64, float32 and once more for each frame of a temporal patch.
"""

from typing import Any, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize


def cut_frames(frames: np.ndarray, depth: int, patch: int, merge: int) -> Tensor:
    """Cut frames into patches. The patches of one visual token are neighbours.

    Args:
        frames: [t * depth, H, W, channels] uint8, H and W whole visual tokens.
        depth: frames of one temporal patch.
        patch: pixels of a patch and side.
        merge: patches of a visual token and side.

    Returns:
        [t * h * w, depth, patch * patch, channels] uint8 with h and w patches along H and W.
    """
    height, width, channels = frames.shape[1:]
    h, w = height // patch // merge, width // patch // merge
    # A line of a patch is one item, because NumPy moves items of any size as a whole.
    lines = np.ascontiguousarray(frames).reshape(-1).view(f"V{patch * channels}")
    cut = lines.reshape(-1, depth, h, merge, patch, w, merge).transpose(0, 2, 5, 3, 6, 1, 4)
    pixels = np.array(cut, order="C").view(np.uint8)
    return torch.from_numpy(pixels.reshape(-1, depth, patch**2, channels))


def join_frames(patches: Tensor, frame: tuple[int, int], depth: int, patch: int, merge: int) -> Tensor:
    """Return the frames of normalised patches, [t * depth, channels, H, W].

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
    """Resize a picture and cut it into patches.

    Args:
        image: RGB picture.
        processor: image processor of the checkpoint.

    Returns:
        pixels: [h * w, 1, patch_size**2, 3] uint8; the patches of one visual token are neighbours. The stock processor
            repeats them to a temporal patch, and normalises them as `image_levels` says.
        grid_thw: [3] int64 patches (1, h, w).

    Raises:
        ValueError: one side is more than 200 times the other.

    Source: Qwen2VLImageProcessorPil of transformers 5.23.
    """
    width, height = _resized(*image.size, processor)
    pixels = np.asarray(resize(image, width, height, processor.resample))
    return cut_frames(pixels[None], 1, processor.patch_size, processor.merge_size), image_grid(*image.size, processor)


def resize(image: Image.Image, width: int, height: int, resample: Any) -> Image.Image:
    """Return the picture in another size, as Hugging Face's processors of the PIL backend resize.

    Pillow does it, because no other library that was tried gives the same bytes (`tools/benchmarks/loader.py`).

    Args:
        image: RGB picture.
        width: pixels of the result.
        height: pixels of the result.
        resample: filter of the image processor.
    """
    return image if image.size == (width, height) else image.resize((width, height), resample=resample)


def image_levels(processor: Any) -> Tensor:
    """Return the normalised number of each byte of a picture, [3, 256] float32.

    The stock processor makes them of a picture of one line that has every byte. It treats each pixel by itself.

    Args:
        processor: image processor of the checkpoint, with a PIL backend.
    """
    line = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    if processor.do_rescale:
        line = processor.rescale(line, processor.rescale_factor)
    if processor.do_normalize:
        line = processor.normalize(line, processor.image_mean, processor.image_std)
    return torch.from_numpy(np.array(line[:, 0], dtype=np.float32))


def image_grid(width: int, height: int, processor: Qwen2VLImageProcessorPil) -> Tensor:
    """Return the grid that `patchify_image` makes of a picture of so many pixels.

    Returns:
        [3] int64 patches (1, h, w).

    Raises:
        ValueError: as in `patchify_image`.
    """
    width, height = _resized(width, height, processor)
    return torch.tensor([1, height // processor.patch_size, width // processor.patch_size])


def _resized(width: int, height: int, processor: Qwen2VLImageProcessorPil) -> tuple[int, int]:
    """Return the width and height to which the processor resizes a picture."""
    if not processor.do_resize:
        return width, height
    height, width = smart_resize(
        height,
        width,
        factor=processor.patch_size * processor.merge_size,
        min_pixels=processor.size["shortest_edge"],
        max_pixels=processor.size["longest_edge"],
    )
    return width, height


def check_levels(levels: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """Check that the numbers of bytes are those of scaling by 1/255 and normalising.

    Bytes are 1 / (255 std) apart after normalising, which is 10^5 times the rounding of float32, so that each number
    has one byte.

    Args:
        levels: [channels, 256] float32 number of each byte.
        mean: mean of each channel, of pixels between 0 and 1.
        std: standard deviation of each channel.

    Raises:
        ValueError: they are other numbers.
    """
    found = 255 * (levels.double() * torch.tensor(std).double()[:, None] + torch.tensor(mean).double()[:, None])
    if not float((found - torch.arange(256)).abs().max()) < 0.01:
        raise ValueError("patches that are no normalised bytes")
