"""Endless stream of prompts with a position that can be saved and restored.

A sample that cannot be used is quarantined: counted, reported once with its key and reason, and skipped. The run goes
on; `state()` remembers the raw position, so that a resumed run skips exactly what was read.
"""

import logging
from dataclasses import dataclass
from pathlib import PurePath
from typing import Iterator, Sequence

from megatron_ral.data.processor import PromptProcessor, SampleError
from megatron_ral.data.shards import DataError, check_first_sample, epoch_entries, find_shards, parse_sample
from megatron_ral.types import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Shards that are cycled over until `num_samples` (over all ranks; 0: for ever) have been taken."""

    shards: tuple[str, ...]
    num_samples: int


def open_sources(patterns: Sequence[tuple[str, int]], key: str) -> list[Source]:
    """Resolve globs to shards and look into each shard once.

    Raises:
        DataError: missing shard, no tar file, or a shard whose first sample lacks a needed field.
    """
    sources = []
    for index, (pattern, num_samples) in enumerate(patterns):
        shards = find_shards(pattern, f"{key}.{index}.shards" if len(patterns) > 1 else key)
        for shard in shards:
            check_first_sample(shard, key)
        sources.append(Source(tuple(shards), num_samples))
    return sources


class PromptLoader:
    """Prompts of one data-parallel rank.

    Args:
        sources: read one after the other.
        processor: sample -> prompt.
        dp_rank, dp_size: this rank's place; tensor and pipeline peers pass the same.
        seed, shuffle, shuffle_buffer: order of the samples.
    """

    def __init__(self, sources: Sequence[Source], processor: PromptProcessor, *, dp_rank: int, dp_size: int, seed: int,
                 shuffle: bool, shuffle_buffer: int):
        self.sources, self.processor = list(sources), processor
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.seed, self.shuffle, self.shuffle_buffer = seed, shuffle, shuffle_buffer
        self.source, self.epoch, self.entries_read, self.taken_from_source = 0, 0, 0, 0
        self.quarantined: dict[str, str] = {}
        self._entries: Iterator[dict] | None = None

    def take(self, count: int) -> list[Prompt]:
        """The next `count` usable prompts.

        Raises:
            DataError: the sources are used up, or a whole epoch held no usable sample.
        """
        return [self._next() for _ in range(count)]

    def state(self) -> dict:
        """Position, for a checkpoint."""
        return {"dp_size": self.dp_size, "source": self.source, "epoch": self.epoch,
                "entries_read": self.entries_read, "taken_from_source": self.taken_from_source,
                "quarantined": dict(self.quarantined)}

    def restore(self, state: dict) -> None:
        """Continue after the position of `state`.

        Raises:
            DataError: the state was saved with another data-parallel size.
        """
        if state["dp_size"] != self.dp_size:
            raise DataError(f"the checkpoint was saved with {state['dp_size']} data-parallel ranks, this run has "
                            f"{self.dp_size}; resume with the same number")
        self.source, self.epoch = state["source"], state["epoch"]
        self.entries_read, self.taken_from_source = state["entries_read"], state["taken_from_source"]
        self.quarantined = dict(state["quarantined"])
        self._entries = self._open()
        for _ in range(self.entries_read):
            next(self._entries)

    def _open(self) -> Iterator[dict]:
        return iter(epoch_entries(
            self.sources[self.source].shards, dp_rank=self.dp_rank, dp_size=self.dp_size, epoch=self.epoch,
            seed=self.seed + 7919 * self.source, shuffle=self.shuffle, shuffle_buffer=self.shuffle_buffer))

    def _next(self) -> Prompt:
        fruitless_epochs = 0
        while True:
            source = self.sources[self.source]
            if source.num_samples and self.taken_from_source * self.dp_size >= source.num_samples:
                if self.source + 1 == len(self.sources):
                    raise DataError(f"the sources of data.train are used up after {source.num_samples} samples of the "
                                    "last one; raise num_samples or set it to 0 (endless)")
                self.source, self.epoch, self.entries_read, self.taken_from_source = self.source + 1, 0, 0, 0
                self._entries = None
                continue
            if self._entries is None:
                self._entries = self._open()
            entry = next(self._entries, None)
            if entry is None:
                fruitless_epochs += 1
                if fruitless_epochs > 1:
                    raise DataError(f"no usable sample in a whole epoch of {len(source.shards)} shards "
                                    f"(first: '{source.shards[0]}'); {len(self.quarantined)} were quarantined")
                self.epoch, self.entries_read, self._entries = self.epoch + 1, 0, None
                continue
            self.entries_read += 1
            try:
                prompt = self.processor(parse_sample(entry))
            except (SampleError, ValueError) as error:
                identity = f"{PurePath(entry['__url__']).name}/{entry['__key__']}"
                if identity not in self.quarantined:
                    self.quarantined[identity] = str(error)
                    logger.warning("quarantined (%d so far): %s", len(self.quarantined), error)
                continue
            self.taken_from_source += 1
            return prompt
