"""Which samples share a micro-batch: those of like length, as each is padded to the longest of its micro-batch."""

from typing import Sequence


def longest_first(lengths: Sequence[int], span: int) -> list[int]:
    """Indices in the order in which samples are cut into micro-batches: every `span` of them, the samples of one optimizer
    step, from long to short (what does not fit shows at once; ranks that wait for each other meet like lengths).

    Args:
        lengths: tokens of each sample.
        span: divides their number.
    """
    return [
        index
        for start in range(0, len(lengths), span)
        for index in sorted(range(start, start + span), key=lambda index: -lengths[index])
    ]
