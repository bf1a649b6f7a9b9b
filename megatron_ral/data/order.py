"""The order of samples: a function of (seed, epoch) alone, for any number of ranks, with random access.

The shards of an epoch are permuted, their samples are cut into windows, and the samples are permuted inside each
window. At most two windows are in memory. With a batch size, batches hold samples of similar length from one window.
"""

import hashlib
import itertools
import random
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Optional, Sequence

import numpy as np


class SeededRandom(random.Random):
    """Generator of random numbers that is seeded by a stable hash of its identity."""

    def __init__(self, *identity: object):
        super().__init__(int.from_bytes(hashlib.blake2b(repr(identity).encode(), digest_size=8).digest(), "little"))


@dataclass(frozen=True)
class Position:
    """Place of the next sample in the stream."""

    source: int = 0
    """Number of the source."""
    epoch: int = 0
    """Epoch of the source, from 0."""
    offset: int = 0
    """Samples of the epoch's order that were drawn."""
    taken: int = 0
    """Usable samples drawn from the source so far, over all ranks and epochs."""


@dataclass(frozen=True)
class Place:
    """Address of one sample."""

    source: int
    """Number of the source."""
    shard: int
    """Number of the shard in the source."""
    number: int
    """Number of the sample in the shard."""


class EpochOrder:
    """Order of one source's samples in each epoch.

    Args:
        numbers: ascending int arrays, one per shard: numbers of the samples that take part.
        seed: seed of the permutations.
        shuffle: permutation of shards and samples; False: file order.
        window: samples permuted together; rounded up to whole batches if `batch_size` is given.
        lengths: arrays, one per shard: length of each sample in `numbers`; needed with `batch_size`.
        batch_size: samples of a batch of similar length; 0: lengths do not matter.
        phase: place of the first sample of epoch 0 inside its batch.
    """

    def __init__(
        self,
        numbers: Sequence[np.ndarray],
        *,
        seed: int,
        shuffle: bool,
        window: int,
        lengths: Optional[Sequence[np.ndarray]] = None,
        batch_size: int = 0,
        phase: int = 0,
    ):
        self.numbers, self.lengths = numbers, lengths
        self.seed, self.shuffle, self.batch_size, self.phase = seed, shuffle, batch_size, phase
        self.window = -(-window // batch_size) * batch_size if batch_size else window
        self.size = sum(len(part) for part in numbers)
        self._held: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def at(self, epoch: int, offset: int, count: int) -> list[tuple[int, int]]:
        """Return (shard, sample number) of up to `count` places from `offset` on, fewer at the end of the epoch."""
        places: list[tuple[int, int]] = []
        while len(places) < count and offset + len(places) < self.size:
            number, start = divmod(offset + len(places), self.window)
            places += self._window(epoch, number)[start : start + count - len(places)]
        return places

    def _window(self, epoch: int, number: int) -> list[tuple[int, int]]:
        if (epoch, number) not in self._held:
            while len(self._held) > 1:  # a batch may lie in this window and in the one before
                self._held.pop(next(iter(self._held)))
            self._held[epoch, number] = self._make_window(epoch, number)
        return self._held[epoch, number]

    def _make_window(self, epoch: int, number: int) -> list[tuple[int, int]]:
        shards = list(range(len(self.numbers)))
        if self.shuffle:
            SeededRandom("shards", self.seed, epoch).shuffle(shards)
        ends = list(accumulate(len(self.numbers[shard]) for shard in shards))
        first = number * self.window
        rows = []
        for place in range(first, min(first + self.window, self.size)):
            turn = bisect_right(ends, place)
            rows.append((shards[turn], place - (ends[turn - 1] if turn else 0)))
        rng = SeededRandom("samples", self.seed, epoch, number)
        if self.shuffle:
            rng.shuffle(rows)
        if self.batch_size:
            rows = self._by_length(rows, (self.phase + epoch * self.size + first) % self.batch_size, rng)
        return [(shard, int(self.numbers[shard][row])) for shard, row in rows]

    def _by_length(self, rows: list[tuple[int, int]], filled: int, rng: random.Random) -> list[tuple[int, int]]:
        """Return the rows in batches of similar length, the batches in a random order.

        Args:
            rows: (shard, row of `numbers`) of a window.
            filled: places of the first batch that the window before has taken.
        """
        lengths = self.lengths
        assert lengths is not None, "batches of similar length need lengths"
        cuts = [0, *range(self.batch_size - filled, len(rows), self.batch_size), len(rows)]
        batches = [(start, stop) for start, stop in itertools.pairwise(cuts) if stop > start]
        ascending = sorted(rows, key=lambda row: int(lengths[row[0]][row[1]]))
        turns = list(range(len(batches)))
        if self.shuffle:
            rng.shuffle(turns)
        result: list = [None] * len(rows)
        taken = 0
        for turn in turns:
            start, stop = batches[turn]
            members = ascending[taken : taken + stop - start]
            if self.shuffle:
                rng.shuffle(members)
            result[start:stop] = members
            taken += stop - start
        return result
