"""Endless stream of prompts with a position that does not know how many ranks read it.

Every data-parallel rank has the same order of samples in mind. A batch is the next usable samples of that order; its
place i belongs to rank i % dp_size. What a rank cannot use it tells the others (`exchange`), and the next sample of the
order takes the place (in the batch where an epoch ends it may stand before the last of that epoch). So the samples of
every batch, and the position after it, are the same for any number of ranks, and no sample is repeated or left out when
their number changes.

A sample that cannot be used is quarantined: counted under its reason, reported once with its key, and not tried again.
What is too long by its index is filtered before, without being read.
"""

import logging
from collections import Counter
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import PurePath
from typing import Any, Callable, Collection, Mapping, Optional, Sequence

import numpy as np

from megatron_ral.config.sections import DataConfig
from megatron_ral.data.prefetch import Prefetcher
from megatron_ral.data.issues import REASONS, SampleIssue, SampleError, printable
from megatron_ral.errors import DataError
from megatron_ral.data.index import UNKNOWN, ShardIndex
from megatron_ral.data.order import EpochOrder
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.data.shards import open_shards, parse_sample, read_entry
from megatron_ral.types import Prompt

logger = logging.getLogger(__name__)

STATE_VERSION = 2


@dataclass(frozen=True)
class Source:
    """Shards that are cycled over until `num_samples` (over all ranks; 0: for ever) have been taken."""

    indexes: tuple[ShardIndex, ...]
    num_samples: int
    key: str = "data.train"
    """Configuration key, for messages."""

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(index.shard for index in self.indexes)


@dataclass(frozen=True)
class Position:
    """Where the next sample comes from."""

    source: int = 0
    epoch: int = 0
    offset: int = 0
    """Places of the epoch's order that are done with."""
    taken: int = 0
    """Usable samples taken from the source so far, over all ranks and epochs."""


@dataclass(frozen=True)
class Place:
    """One sample of a source."""

    source: int
    shard: int
    number: int


def open_sources(patterns: Sequence[tuple[str, int]], key: str) -> list[Source]:
    """Resolve globs to shards, open their indexes and look into each shard once.

    Raises:
        DataError: as in open_shards.
    """
    sources = []
    for number, (pattern, num_samples) in enumerate(patterns):
        name = f"{key}.{number}.shards" if len(patterns) > 1 else key
        sources.append(Source(tuple(open_shards(pattern, name)), num_samples, name))
    return sources


def shard_labels(shards: Collection[str]) -> dict[str, str]:
    """Path of each shard -> its name, with as many folders before it as tell all of them apart."""
    for depth in range(1, max(len(PurePath(shard).parts) for shard in shards) + 1):
        labels = {shard: "/".join(PurePath(shard).parts[-depth:]) for shard in shards}
        if len(set(labels.values())) == len(labels):
            break
    return labels


class PromptLoader:
    """Prompts of one data-parallel rank.

    Args:
        sources: read one after the other.
        processor: sample -> prompt; its limits are the filter.
        settings: order and decoding.
        dp_rank, dp_size: this rank's place; tensor and pipeline peers pass the same.
        seed: of the order.
        batch_size: what `take` is called with, for batches of similar length; 0: unknown.
        exchange: gathers a small object from every rank; may be left out for one rank. With tensor and pipeline peers
            in it, a sample that one of them alone cannot read is left out by all.
        report: whether this process logs what is found (every process finds the same).
    """

    def __init__(
        self,
        sources: Sequence[Source],
        processor: PromptProcessor,
        settings: DataConfig,
        *,
        dp_rank: int,
        dp_size: int,
        seed: int,
        batch_size: int = 0,
        report: bool = True,
        exchange: Optional[Callable[[Any], list[Any]]] = None,
    ):
        assert exchange is not None or dp_size == 1, "several data-parallel ranks need an exchange"
        self.sources, self.processor, self.settings = list(sources), processor, settings
        self.dp_rank, self.dp_size, self.report = dp_rank, dp_size, report
        self.position = Position()
        self.filtered: Counter[str] = Counter()
        self._exchange = exchange or (lambda value: [value])
        self._faults: dict[str, SampleIssue] = {}
        self._labels = shard_labels({index.shard for source in self.sources for index in source.indexes})
        self._unusable: set[Place] = set()
        self._agreed = False
        self._ahead = Prefetcher(self._decode, settings.decode_workers, settings.decode_ahead)
        fingerprint = (
            processor.fingerprint() if any(index.fingerprint for source in sources for index in source.indexes) else ""
        )
        self._orders, phase = [], 0
        for number, source in enumerate(self.sources):
            self._orders.append(self._order(number, source, fingerprint, seed + 7919 * number, batch_size, phase))
            phase += source.num_samples

    @property
    def quarantined(self) -> Mapping[str, str]:
        """Shard name (with its folder where two are called alike) and key -> why the sample (or the rest of the shard) is
        not used; the same on every rank. A repeated key has the number of its sample behind it."""
        return {identity: fault.text for identity, fault in self._faults.items()}

    @property
    def quarantined_by_reason(self) -> Counter[str]:
        """How many were quarantined for each reason (`faults.REASONS`)."""
        return Counter(fault.reason for fault in self._faults.values())

    def take(self, count: int) -> list[Prompt]:
        """This rank's share of the next `count` usable prompts; every data-parallel rank calls it with the same count.

        Raises:
            DataError: the sources are used up, a whole epoch held no usable sample, a shard can no longer be read, or
                (first call) ranks have other orders.
        """
        self._agree()
        mine: dict[int, Prompt] = {}
        pending, fruitless_epochs = list(range(count)), 0
        while pending:
            places, self.position, ended = self._draw(self.position, len(pending))
            fruitless_epochs += ended
            if fruitless_epochs > 1:
                raise self._fruitless()
            drawn = dict(zip(pending, places))
            results = self._ahead.get(
                {slot: place for slot, place in drawn.items() if slot % self.dp_size == self.dp_rank}
            )
            failed: dict[int, SampleIssue] = {}
            if drawn:
                bad = {
                    slot: (result.reason, result.text)
                    for slot, result in results.items()
                    if isinstance(result, SampleIssue)
                }
                failed = {slot: SampleIssue(*fault) for rank in self._exchange(bad) for slot, fault in rank.items()}
            for slot in sorted(failed):
                self._quarantine(drawn[slot], failed[slot])
            mine |= {
                slot: result for slot, result in results.items() if isinstance(result, Prompt) and slot not in failed
            }
            if len(drawn) > len(failed):
                fruitless_epochs = 0
            self.position = replace(self.position, taken=self.position.taken + len(drawn) - len(failed))
            pending = sorted(failed) + pending[len(drawn) :]
        self._look_ahead(count)
        return [mine[slot] for slot in sorted(mine)]

    def _agree(self) -> None:
        """Once: all ranks found the same samples in the same order, or all of them end."""
        if self._agreed:
            return
        for number, source in enumerate(self.sources):
            told = self._exchange(self._identity(number))
            other = next((rank for rank, identity in enumerate(told) if identity != told[0]), None)
            if other is not None:
                found = self._exchange([(index.shard, index.fingerprint, index.note) for index in source.indexes])
                shard = next(
                    (ours[0] for ours, theirs in zip(found[0], found[other]) if ours != theirs), source.shards[0]
                )
                raise DataError(
                    f"{source.key}: rank {other} found other samples, or another order of them, than rank 0 (first "
                    f"difference: the index of '{shard}'); is tools/index_shards.py at work, or a disk slow to show "
                    "its files? Start again when all nodes see the same"
                )
        self._agreed = True

    def state(self) -> dict:
        """Position, for a checkpoint; the same on every rank."""
        position = self.position
        return {
            "version": STATE_VERSION,
            "source": position.source,
            "epoch": position.epoch,
            "offset": position.offset,
            "taken_from_source": position.taken,
            "orders": [self._identity(number) for number in range(len(self.sources))],
            "unusable": sorted([place.source, place.shard, place.number] for place in self._unusable),
            "quarantined": {name: [fault.reason, fault.text] for name, fault in self._faults.items()},
        }

    def restore(self, state: dict) -> None:
        """Continue after the position of `state`, saved with any number of ranks.

        Raises:
            DataError: a state of an older version, or of other shards.
        """
        if state.get("version") != STATE_VERSION:
            raise DataError(
                "the checkpoint's position in the data is of an older version; start again from its exported weights"
            )
        for number, saved in enumerate(state["orders"]):
            if number >= len(self.sources) or saved != self._identity(number):
                key = self.sources[min(number, len(self.sources) - 1)].key
                raise DataError(
                    f"the shards of {key}, their indexes, the limits of a prompt's length, or what else decides "
                    "the order (seed, data.shuffle, shuffle_buffer, group_by_length and the batch size) are not "
                    "those of the checkpoint, so its position means nothing in them; put them back, or start "
                    "again from its exported weights"
                )
        self._faults = {name: SampleIssue(*fault) for name, fault in state["quarantined"].items()}
        self._unusable = {Place(*place) for place in state["unusable"]}
        self.position = Position(state["source"], state["epoch"], state["offset"], state["taken_from_source"])

    def _order(
        self, number: int, source: Source, fingerprint: str, seed: int, batch_size: int, phase: int
    ) -> EpochOrder:
        """Order of the samples of a source that its headers and lengths leave."""
        numbers, lengths, filtered = [], [], Counter()
        unknown = [index for index in source.indexes if index.prompt_lengths is None]
        foreign = [
            index for index in source.indexes if index.prompt_lengths is not None and index.fingerprint != fingerprint
        ]
        for shard, index in enumerate(source.indexes):
            if index.damage:
                self._faults[self._labels[index.shard]] = SampleIssue(
                    "truncated", f"shard '{index.shard}': {index.damage}"
                )
            for sample, fault in index.faults.items():
                repeated = f"#{sample}" if fault.reason == "duplicate_key" else ""
                self._faults[self._name(Place(number, shard, sample)) + repeated] = fault
            admitted = [sample for sample in range(len(index)) if sample not in index.faults]
            if index.prompt_lengths is not None and index.fingerprint == fingerprint:
                admitted = [sample for sample in admitted if self._admits(index, sample, filtered)]
                lengths.append(index.prompt_lengths[admitted])
            numbers.append(np.array(admitted, dtype=np.int64))
        self.filtered += filtered
        if self.report:
            self._report_source(source, unknown, foreign, filtered)
        similar = self.settings.group_by_length and batch_size > 1 and len(lengths) == len(source.indexes)
        if not any(len(part) for part in numbers):
            raise DataError(
                f"{source.key}: no sample of {len(source.indexes)} shards (first: '{source.shards[0]}') can be "
                f"used; {sum(self.filtered.values())} are too long, {len(self._faults)} are faulty"
            )
        return EpochOrder(
            numbers,
            seed=seed,
            shuffle=self.settings.shuffle,
            window=self.settings.shuffle_buffer,
            lengths=lengths if similar else None,
            batch_size=batch_size if similar else 0,
            phase=phase,
        )

    def _admits(self, index: ShardIndex, sample: int, filtered: Counter) -> bool:
        prompt_length, visual_tokens = int(index.prompt_lengths[sample]), int(index.visual_tokens[sample])
        if prompt_length == UNKNOWN:
            return True
        reason = self.processor.limit_passed(prompt_length, visual_tokens)
        if reason is not None:
            filtered[reason[0]] += 1
        return reason is None

    def _report_source(
        self, source: Source, unknown: list[ShardIndex], foreign: list[ShardIndex], filtered: Mapping[str, int]
    ) -> None:
        consequence = (
            "prompts are measured when they are decoded"
            + (", and data.group_by_length has no effect" if self.settings.group_by_length else "")
            + "; tools/index_shards.py makes indexes"
        )
        if unknown:
            logger.warning(
                "%s: the index of %d of %d shards is %s (first: '%s'); headers were read instead, %s",
                source.key,
                len(unknown),
                len(source.indexes),
                unknown[0].note,
                unknown[0].shard,
                consequence,
            )
        if foreign:
            logger.warning(
                "%s: the index of %d of %d shards was made with another tokenizer, image "
                "processor or data.prompt_suffix (first: '%s'); %s",
                source.key,
                len(foreign),
                len(source.indexes),
                foreign[0].shard,
                consequence,
            )
        for reason, count in filtered.items():
            logger.warning(
                "%s: %d of %d samples are left out by their index: %s",
                source.key,
                count,
                sum(map(len, source.indexes)),
                REASONS[reason],
            )
        for index in source.indexes:
            if index.damage:
                logger.warning("shard '%s': %s; the samples before are used", index.shard, index.damage)
            for fault in index.faults.values():
                logger.warning("quarantined: %s", fault.text)

    def _draw(self, position: Position, count: int) -> tuple[list[Place], Position, int]:
        """Up to `count` places to try, all of one source and epoch, the position behind them, and epochs that ended.
        None are returned where only faulty ones are left in the epoch.

        Raises:
            DataError: the sources are used up.
        """
        source = self.sources[position.source]
        if source.num_samples and position.taken >= source.num_samples:
            if position.source + 1 == len(self.sources):
                raise DataError(
                    f"the sources of data.train are used up after {source.num_samples} samples of the "
                    "last one; raise num_samples or set it to 0 (endless)"
                )
            return [], Position(source=position.source + 1), 0
        if source.num_samples:
            count = min(count, source.num_samples - position.taken)
        order, ended = self._orders[position.source], 0
        if position.offset == order.size:
            position, ended = replace(position, epoch=position.epoch + 1, offset=0), 1
        drawn = [Place(position.source, *place) for place in order.at(position.epoch, position.offset, count)]
        usable = [place for place in drawn if place not in self._unusable]
        return usable, replace(position, offset=position.offset + len(drawn)), ended

    def _look_ahead(self, count: int) -> None:
        """Begin to decode this rank's share of the batch that is likely to come."""
        if not self._ahead.limit:
            return
        try:
            places, _, _ = self._draw(self.position, count)
        except DataError:
            return
        self._ahead.begin([place for slot, place in enumerate(places) if slot % self.dp_size == self.dp_rank])

    def _decode(self, place: Place) -> Prompt | SampleIssue:
        try:
            return self.processor(
                parse_sample(read_entry(self.sources[place.source].indexes[place.shard], place.number))
            )
        except SampleError as error:
            return SampleIssue(error.reason, str(error))
        except Exception as error:  # decoders of foreign bytes may raise anything, and one sample must not end a run
            return SampleIssue("unusable", f"sample '{self._name(place)}': {type(error).__name__}: {error}")

    def _quarantine(self, place: Place, fault: SampleIssue) -> None:
        if fault.reason == "cannot_read":
            raise DataError(f"{self.sources[place.source].key}: {fault.text}")
        self._faults[self._name(place)] = fault
        self._unusable.add(place)
        if self.report:
            logger.warning("quarantined (%d so far): %s", len(self._faults), fault.text)

    def _fruitless(self) -> DataError:
        source = self.sources[self.position.source]
        return DataError(
            f"no usable sample in a whole epoch of {len(source.indexes)} shards (first: "
            f"'{source.shards[0]}'); {len(self._faults)} were quarantined"
        )

    def _name(self, place: Place) -> str:
        index = self.sources[place.source].indexes[place.shard]
        return f"{self._labels[index.shard]}/{printable(index.keys[place.number])}"

    def _identity(self, number: int) -> str:
        """Of a source's order: which samples of which shards, in which order."""
        order, source = self._orders[number], self.sources[number]
        settings = order.seed, order.shuffle, order.window, order.batch_size, order.phase
        digest = blake2b(repr(settings).encode(), digest_size=16)
        for index, numbers in zip(source.indexes, order.numbers):
            digest.update(repr((PurePath(index.shard).name, len(index))).encode() + numbers.tobytes())
        for part in order.lengths or ():
            digest.update(part.tobytes())
        return digest.hexdigest()
