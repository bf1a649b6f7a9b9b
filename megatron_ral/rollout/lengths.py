"""Cut of samples into micro-batches.

A pass computes no padding but in attention, where a sample is padded to the longest of its micro-batch.
"""

from dataclasses import dataclass
from typing import Sequence

import torch

from megatron_ral.config.sections import RunConfig
from megatron_ral.parallel.collectives import all_reduce_max_
from megatron_ral.parallel.process_groups import ProcessGroups


@dataclass(frozen=True)
class MicroBatchSettings:
    """Size of the micro-batches of one rank."""

    num_groups: int
    """Number of prompt groups. It has no effect where `num_tokens` is set."""
    num_tokens: int = 0
    """Largest number of tokens, without padding. A longer group is alone. 0: none is set."""

    @classmethod
    def from_config(cls, config: RunConfig) -> "MicroBatchSettings":
        return cls(config.train.micro_batch_size, config.train.tokens_per_micro_batch)

    def num_largest(self, tokens: int, num_groups: int) -> int:
        """Return the groups of a micro-batch whose groups have the largest size.

        A limit of tokens that is no multiple of it is rounded up, so that no micro-batch takes more memory.

        Args:
            tokens: Tokens of the largest group.
            num_groups: Groups of one optimizer step on this rank.
        """
        return min(-(-self.num_tokens // tokens) if self.num_tokens else self.num_groups, num_groups)


def cut_into_micro_batches(
    lengths: Sequence[int], span: int, settings: MicroBatchSettings, process_groups: ProcessGroups
) -> list[list[int]]:
    """Return the samples of each micro-batch, the micro-batches of each optimizer step one after the other.

    All optimizer steps on all data-parallel ranks have the same number of micro-batches, because ranks may exchange
    weights during each of them.

    Args:
        lengths: Number of tokens of each sample of this rank.
        span: Number of samples of one optimizer step. It divides the number of samples.
        settings: Size of a micro-batch.
        process_groups: Process groups of this rank. All ranks make the same call.
    """
    order = longest_first(lengths, span)
    steps = [order[start : start + span] for start in range(0, len(order), span)]
    if not settings.num_tokens:
        size = min(settings.num_groups, span)
        return [step[start : start + size] for step in steps for start in range(0, span, size)]
    cuts = [spread(lengths, step, settings.num_tokens) for step in steps]
    count = torch.tensor(max(map(len, cuts)), device=process_groups.device)
    wanted = int(all_reduce_max_(count, process_groups.data))
    return [part for cut in cuts for part in split_further(lengths, cut, wanted)]


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


def spread(lengths: Sequence[int], samples: Sequence[int], num_tokens: int) -> list[list[int]]:
    """Spread samples over few micro-batches of at most `num_tokens` tokens each, as evenly as a simple rule does it.

    Each sample in turn joins the micro-batch with the fewest tokens. A sample of more tokens is alone.

    Args:
        lengths: Number of tokens of each sample.
        samples: Samples from long to short, at least one.
        num_tokens: Largest number of tokens of a micro-batch.

    Returns:
        Micro-batches, none of which is empty. The one with the longest sample comes first.

    Source: longest processing time first (R. L. Graham, 1969).
    """
    limit = max(num_tokens, lengths[samples[0]])
    count = -(-sum(lengths[index] for index in samples) // limit)
    while True:
        parts: list[list[int]] = [[] for _ in range(count)]
        sizes = [0] * count
        for index in samples:
            chosen = sizes.index(min(sizes))
            parts[chosen].append(index)
            sizes[chosen] += lengths[index]
        if all(size <= num_tokens or len(part) == 1 for size, part in zip(sizes, parts)):
            return parts
        count += 1


def split_further(lengths: Sequence[int], parts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Split micro-batches until there are `count` of them, always the one with the most tokens of those that can be.

    Args:
        lengths: Number of tokens of each sample.
        parts: Micro-batches, at most `count`, of at least `count` samples together.
        count: Number of micro-batches.
    """
    result = [list(part) for part in parts]
    while len(result) < count:
        chosen = max(
            (number for number, part in enumerate(result) if len(part) > 1),
            key=lambda number: sum(lengths[index] for index in result[number]),
        )
        result[chosen : chosen + 1] = [result[chosen][::2], result[chosen][1::2]]
    return result
