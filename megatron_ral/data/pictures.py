"""Picture -> patches: the numbers of Hugging Face's Qwen2VLImageProcessorPil, bit for bit, in a fifth of its time.

Departure from it: pixels are put in the order of patches while they are bytes, and each is converted to float once
instead of once per temporal copy.
"""

import io

import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from megatron_ral.data.video import MAX_SIDE, PICTURE_FORMATS

MAX_IMAGE_PIXELS = 2**27


def open_image(data: bytes) -> Image.Image:
    """Open a PNG, JPEG or WebP file from an untrusted source.

    No other decoder is tried, and the declared size is checked before a pixel is decoded.

    Raises:
        PIL.Image.DecompressionBombError: too many pixels.
        Exception: any error of PIL for bytes that are no such picture.
    """
    image = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
    if max(image.size) > MAX_SIDE or image.width * image.height > MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    return image


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
    grid = image_grid(image, processor)
    h, w = grid[1:].tolist()
    image = image.resize((w * patch, h * patch), resample=processor.resample)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    cut = pixels.view(h // merge, merge, patch, w // merge, merge, patch, 3).permute(0, 3, 1, 4, 6, 2, 5)
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (processor.image_mean, processor.image_std))
    # float64, because the stock processor scales in it
    values = (cut.reshape(h * w, 3, 1, patch, patch).double() * processor.rescale_factor).float().sub_(mean).div_(std)
    return values.expand(-1, -1, depth, -1, -1).reshape(h * w, -1), grid


def image_grid(image: Image.Image, processor: Qwen2VLImageProcessorPil) -> Tensor:
    """Return the grid that `patchify_image` makes of an image, from its size alone.

    Returns:
        [3] int64 patches (1, h, w).

    Raises:
        ValueError: as in `patchify_image`.
    """
    height, width = image.height, image.width
    if processor.do_resize:
        height, width = smart_resize(
            height,
            width,
            factor=processor.patch_size * processor.merge_size,
            min_pixels=processor.size["shortest_edge"],
            max_pixels=processor.size["longest_edge"],
        )
    return torch.tensor([1, height // processor.patch_size, width // processor.patch_size])
