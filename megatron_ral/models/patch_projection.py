"""Projection of patches in a vision tower, as the matrix product that it is.

The towers of transformers have a convolution whose input is one patch, as large as its kernel. cuDNN has no fast kernel
for that shape: seconds per call were seen in bfloat16 on an H100 (sgl-project/sglang-omni#539, huggingface/transformers
#45750), and oneDNN takes several times as long as the product on the CPU. The weights stay as they are in checkpoints.
"""

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear


class PatchProjection(torch.nn.Conv3d):
    """Convolution over inputs [N, C, T, H, W] of the kernel's own size, with outputs [N, D, 1, 1, 1]."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def project_patches(tower: torch.nn.Module) -> None:
    """Replace the convolution of a tower's `patch_embed`, if it has one, by a matrix product."""
    projection = getattr(getattr(tower, "patch_embed", None), "proj", None)
    if isinstance(projection, torch.nn.Conv3d) and projection.kernel_size == projection.stride:
        projection.__class__ = cast(type, PatchProjection)
