"""Multimodal rotary position ids of Qwen2-VL / Qwen2.5-VL (temporal, height, width)."""

import torch
from torch import Tensor


def multimodal_positions(is_visual: Tensor, grids: Tensor, spatial_merge_size: int) -> tuple[Tensor, int]:
    """Position ids of one prompt.

    Text advances all three coordinates together. An image of grid (t, h, w) keeps the temporal coordinate and spreads
    (h / merge) x (w / merge) over height and width; the text after it continues at the start + max(h, w) / merge.

    Args:
        is_visual: [P] bool, True at visual tokens. Each run of visual tokens holds whole images.
        grids: [I, 3] int64 patches (t, h, w) of each image in order.
        spatial_merge_size: patches per visual token and side.

    Returns:
        ([3, P] int64 positions, position of the next text token).

    Raises:
        ValueError: the visual tokens do not match the grids.

    Source: Qwen2-VL (arXiv 2409.12191) section 2.1, M-RoPE.
    """
    columns, position, index, image = [], 0, 0, 0
    flags = is_visual.tolist()
    while index < len(flags):
        if not flags[index]:
            columns.append(torch.full((3, 1), position, dtype=torch.int64))
            position, index = position + 1, index + 1
            continue
        if image >= len(grids):
            raise ValueError(f"visual tokens at position {index} belong to no image ({len(grids)} images)")
        t, h, w = (int(value) for value in grids[image])
        h, w = h // spatial_merge_size, w // spatial_merge_size
        if not all(flags[index:index + t * h * w]) or index + t * h * w > len(flags):
            raise ValueError(f"image {image} needs {t * h * w} visual tokens in one run at position {index}")
        axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        columns.append(torch.stack(axes).reshape(3, -1) + position)
        position, index, image = position + max(h, w), index + t * h * w, image + 1
    if image != len(grids):
        raise ValueError(f"{len(grids)} images but visual tokens for {image}")
    return torch.cat(columns, dim=1), position
