"""Cutting of a batch of rows into blocks, so that temporaries stay small beside one map of rows.

Users call `blocks.row_blocks` through this module, because a rehearsal on fake tensors replaces it there.
"""

from typing import Iterator, Optional, Sequence

from torch import Tensor

from megatron_ral.attention.types import Block

SMALL_BLOCK, LARGE_BLOCK = 1 << 16, 1 << 18
"""Elements of a temporary: of the weights of one key/value head at least, of a formula over rows."""
SMALL_MAP = 1 << 21
"""Elements below which a map of rows is small, 8 MiB: temporaries of `LARGE_BLOCK` do not weigh beside a model then."""


def formula_elements(rows: Tensor) -> Optional[int]:
    """Return how many elements of a map of rows [.., S] a formula should take at once, the same for maps of one size.

    On a GPU, where every operation costs a launch, a quarter of the map; elsewhere the default of `row_blocks` (None),
    which fits into a cache.
    """
    return max(LARGE_BLOCK, rows.numel() // 4) if rows.is_cuda else None


def row_blocks(shape: Sequence[int], row_elements: int, elements: Optional[int] = None) -> Iterator[Block]:
    """Cut rows into blocks: whole batch entries where they are small, else responses, else rows.

    Args:
        shape: B, G, R.
        row_elements: Elements that one row takes.
        elements: Elements that a block should take at most (one row may take more). None: `LARGE_BLOCK`.

    Yields:
        Blocks in the order b, g, r that together hold each row once.
    """
    B, G, R = shape
    elements = elements or LARGE_BLOCK
    rows = min(R, max(1, elements // row_elements))
    responses = min(G, max(1, elements // (row_elements * R))) if rows == R else 1
    entries = min(B, max(1, elements // (row_elements * R * G))) if responses == G else 1
    for b in range(0, B, entries):
        for g in range(0, G, responses):
            for r in range(0, R, rows):
                yield slice(b, min(b + entries, B)), slice(g, min(g + responses, G)), slice(r, min(r + rows, R))
