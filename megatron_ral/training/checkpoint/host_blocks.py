"""Host memory for copies of a state, page-locked beside a GPU and cut from few blocks.

torch rounds a page-locked tensor up to a power of two, and asking for it takes long. Tensors of any size, each with
memory of its own, would take up to twice their bytes.
"""

import math

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 28
"""Bytes of a block, a power of two. A larger tensor has a block of its own."""
_ALIGNMENT = 64


class HostBlocks:
    """Blocks of host memory that tensors are cut from. They are never freed one by one.

    Args:
        are_pinned: whether the memory is page-locked, so that a GPU can copy to it while the host goes on.
    """

    def __init__(self, are_pinned: bool):
        self.are_pinned = are_pinned
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor without contents."""
        size = math.prod(shape) * dtype.itemsize
        if size > BLOCK_BYTES:
            return torch.empty(shape, dtype=dtype, pin_memory=self.are_pinned)
        if self._used + size > len(self._block):
            self._block, self._used = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=self.are_pinned), 0
        start = self._used
        self._used = -(-(start + size) // _ALIGNMENT) * _ALIGNMENT
        return self._block[start : start + size].view(dtype).view(shape)
