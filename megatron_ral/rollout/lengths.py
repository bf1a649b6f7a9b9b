"""Order in which samples are cut into micro-batches.

Every sample is padded to the longest of its micro-batch. Samples of similar length therefore share a micro-batch.
"""

from typing import Sequence


def longest_first(lengths: Sequence[int], span: int) -> list[int]:
    """Sort the samples of each optimizer step from long to short.

    The longest samples come first, so that a step that does not fit into memory fails at once. Ranks that wait for each
    other process samples of similar length at the same time.

    Args:
        lengths: Number of tokens of each sample.
        span: Number of samples of one optimizer step. It divides the number of samples.

    Returns:
        Indices of the samples in their new order. Those of one step stay together.
    """
    return [
        index
        for start in range(0, len(lengths), span)
        for index in sorted(range(start, start + span), key=lambda index: -lengths[index])
    ]
