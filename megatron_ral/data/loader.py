"""Endless stream of prompts whose position does not depend on the number of ranks that read it.

Every data-parallel rank knows the same order of samples. A batch consists of the next usable samples of that order, and
rank i % dp_size gets the i-th of them. A rank tells the others which samples it cannot use (`exchange`), and the next
samples of the order take their places; in the batch where an epoch ends, such a sample may stand before the last ones
of that epoch. So the samples of every batch, and the position after it, are the same for any number of ranks, and no
sample is repeated or left out if that number changes.

A sample that cannot be used is quarantined: counted under its reason, reported once with its key, and not tried again.
A sample that is too long by its index is left out without being read (`admission.py`).
"""

import logging
from collections import Counter
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import PurePath
from typing import Any, Callable, Collection, Mapping, Optional, Sequence, TypeVar, cast

from megatron_ral.config.sections import DataConfig
from megatron_ral.data.admission import admit_samples, report_admission
from megatron_ral.data.index import ShardIndex
from megatron_ral.data.issues import SampleError, SampleIssue, printable
from megatron_ral.data.order import EpochOrder, Place, Position
from megatron_ral.data.peers import ReplicaPeers
from megatron_ral.data.prefetch import Prefetcher
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.data.shards import open_shards, parse_sample, read_entry
from megatron_ral.errors import DataError
from megatron_ral.types import Prompt, Sample

logger = logging.getLogger(__name__)

STATE_VERSION = 2
Made = TypeVar("Made")


@dataclass(frozen=True)
class Source:
    """Shards whose samples are read together, epoch after epoch."""

    indexes: tuple[ShardIndex, ...]
    """Indexes of the shards."""
    num_samples: int
    """Usable samples, over all ranks, after which the next source begins; 0: endless."""
    key: str = "data.train"
    """Setting that names the source, for messages."""

    @property
    def shards(self) -> tuple[str, ...]:
        """Return the paths of the shards."""
        return tuple(index.shard for index in self.indexes)


def open_sources(patterns: Sequence[tuple[str, int]], key: str) -> list[Source]:
    """Resolve globs to shards, open their indexes and test each shard once.

    Args:
        patterns: (glob, number of samples) of each source.
        key: setting that holds the globs, for messages.

    Raises:
        DataError: as in `open_shards`.
    """
    sources = []
    for number, (pattern, num_samples) in enumerate(patterns):
        name = f"{key}.{number}.shards" if len(patterns) > 1 else key
        sources.append(Source(tuple(open_shards(pattern, name)), num_samples, name))
    return sources


def shard_labels(shards: Collection[str]) -> dict[str, str]:
    """Return path -> file name of each shard, with as many folders before it as tell all shards apart."""
    for depth in range(1, max(len(PurePath(shard).parts) for shard in shards) + 1):
        labels = {shard: "/".join(PurePath(shard).parts[-depth:]) for shard in shards}
        if len(set(labels.values())) == len(labels):
            break
    return labels


class PromptLoader:
    """Stream of one data-parallel rank's prompts.

    Args:
        sources: sources that are read one after the other.
        processor: maker of prompts; its limits leave out samples that are too long.
        settings: order and decoding.
        dp_rank: data-parallel rank of this process; its tensor and pipeline peers pass the same.
        dp_size: number of data-parallel ranks.
        seed: seed of the order.
        batch_size: argument of every `take`, for batches of similar length; 0: unknown.
        exchange: function that gathers a small object from every rank; may be left out for one rank. If it includes
            tensor and pipeline peers, a sample that only one of them cannot read is left out by all.
        report: warnings of what is found; every process finds the same, so one of them suffices.
        peers: tensor and pipeline peers, of which one decodes for all; `exchange` has to include them. Left out: every
            process decodes for itself.
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
        peers: Optional[ReplicaPeers] = None,
    ):
        assert exchange is not None or dp_size == 1, "several data-parallel ranks need an exchange"
        self.sources, self.processor, self.settings = list(sources), processor, settings
        self.dp_rank, self.dp_size, self.report = dp_rank, dp_size, report
        self.position = Position()
        self.places: dict[int, Place] = {}
        """Place of the prompt of each slot of the newest batch, of all ranks."""
        self.filtered: Counter[str] = Counter()
        self._exchange = exchange or (lambda value: [value])
        self._faults: dict[str, SampleIssue] = {}
        self._labels = shard_labels({index.shard for source in self.sources for index in source.indexes})
        self._unusable: set[Place] = set()
        self._agreed = False
        self._peers = peers or ReplicaPeers()
        make, workers = (self._decode, settings.decode_workers) if self._peers.decodes else (self._parse, 0)
        self._prefetcher = Prefetcher(make, workers, settings.decode_ahead)
        fingerprint = (
            processor.fingerprint() if any(index.fingerprint for source in sources for index in source.indexes) else ""
        )
        self._orders, phase = [], 0
        for number, source in enumerate(self.sources):
            self._orders.append(self._order(number, source, fingerprint, seed + 7919 * number, batch_size, phase))
            phase += source.num_samples

    @property
    def quarantined(self) -> Mapping[str, str]:
        """Return shard name and key of each quarantined sample -> the reason in words; the same on every rank.

        The shard's name includes folders where two shards have the same name. A repeated key is followed by the number
        of its sample. An entry without a key stands for the unreadable rest of a shard.
        """
        return {identity: fault.text for identity, fault in self._faults.items()}

    @property
    def quarantined_by_reason(self) -> Counter[str]:
        """Return the number of quarantined samples for each reason (`issues.REASONS`)."""
        return Counter(fault.reason for fault in self._faults.values())

    def take(self, count: int) -> list[Prompt]:
        """Return this rank's share of the next `count` usable prompts (see `fill`)."""
        self.places = {}
        mine = self.fill(range(count))
        self._prefetch(count)
        return [mine[slot] for slot in sorted(mine)]

    def fill(self, slots: Sequence[int]) -> dict[int, Prompt]:
        """Return the next usable prompts for this rank's slots of a batch. Slot i belongs to rank i % dp_size.

        Args:
            slots: Ascending slots of all ranks. Every rank of the exchange has to pass the same.

        Raises:
            DataError: the sources are used up, a whole epoch held no usable sample, a shard can no longer be read, or
                (in the first call) ranks have different orders.
        """
        self._agree()
        mine: dict[int, Prompt] = {}
        pending, fruitless_epochs = list(slots), 0
        while pending:
            places, self.position, ended = self._draw(self.position, len(pending))
            fruitless_epochs += ended
            if fruitless_epochs > 1:
                raise self._fruitless()
            drawn = dict(zip(pending, places))
            results = self._prefetcher.get(
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
            self.places |= {slot: place for slot, place in drawn.items() if slot not in failed}
            usable = [slot for slot in sorted(results) if slot not in failed]
            mine |= zip(usable, self._peers.share([cast(Prompt | Sample, results[slot]) for slot in usable]))
            if len(drawn) > len(failed):
                fruitless_epochs = 0
            self.position = replace(self.position, taken=self.position.taken + len(drawn) - len(failed))
            pending = sorted(failed) + pending[len(drawn) :]
        return mine

    def read(self, places: Mapping[int, Place]) -> list[Prompt]:
        """Return this rank's prompts of an earlier batch once more, in the order of their slots. All ranks call this.

        Args:
            places: `places` as they were after that batch, in a run with any number of ranks.

        Raises:
            DataError: a sample can no longer be used, on some rank.
        """
        results = self._prefetcher.get({slot: p for slot, p in places.items() if slot % self.dp_size == self.dp_rank})
        bad = {slot: result.text for slot, result in results.items() if isinstance(result, SampleIssue)}
        if told := [item for rank in self._exchange(bad) for item in rank.items()]:
            slot, text = min(told)
            raise DataError(self.sources[places[slot].source].key, None, f": {text}; it was usable before")
        return self._peers.share([cast(Prompt | Sample, results[slot]) for slot in sorted(results)])

    def _agree(self) -> None:
        """Raise DataError on all ranks if they found different samples or orders; compared once."""
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
                    source.key,
                    None,
                    f": rank {other} found other samples, or another order of them, than rank 0 (first "
                    f"difference: the index of '{shard}'); is tools/index_shards.py at work, or a disk slow to show "
                    "its files? Start again when all nodes see the same",
                )
        self._agreed = True

    def state(self) -> dict:
        """Return the position and the quarantined samples, for a checkpoint; the same on every rank."""
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
        """Continue after a saved position.

        Args:
            state: return value of `state` with any number of ranks.

        Raises:
            DataError: a state of an older version, or of other shards.
        """
        if state.get("version") != STATE_VERSION:
            raise DataError(
                "the checkpoint's position in the data",
                None,
                "is of an older version; start again from its exported weights",
            )
        for number, saved in enumerate(state["orders"]):
            if number >= len(self.sources) or saved != self._identity(number):
                key = self.sources[min(number, len(self.sources) - 1)].key
                raise DataError(
                    key,
                    None,
                    ": its shards, their indexes, the limits of a prompt's length, or another setting behind the order "
                    "(seed, data.shuffle, shuffle_buffer, group_by_length and the batch size) are not those of the "
                    "checkpoint, so its position means nothing in them; put them back, or start again from its "
                    "exported weights",
                )
        self._faults = {name: SampleIssue(*fault) for name, fault in state["quarantined"].items()}
        self._unusable = {Place(*place) for place in state["unusable"]}
        self.position = Position(state["source"], state["epoch"], state["offset"], state["taken_from_source"])

    def _order(
        self, number: int, source: Source, fingerprint: str, seed: int, batch_size: int, phase: int
    ) -> EpochOrder:
        """Return the order of a source's samples, and quarantine those that its headers show to be faulty.

        Raises:
            DataError: no sample can be used.
        """
        for shard, index in enumerate(source.indexes):
            if index.damage:
                text = f"shard '{index.shard}': {index.damage}"
                self._faults[self._labels[index.shard]] = SampleIssue("truncated", text)
            for sample, fault in index.faults.items():
                repeated = f"#{sample}" if fault.reason == "duplicate_key" else ""
                self._faults[self._name(Place(number, shard, sample)) + repeated] = fault
        admission = admit_samples(source.indexes, fingerprint, self.processor.limit_passed)
        self.filtered += admission.filtered
        grouped = self.settings.group_by_length
        if self.report:
            report_admission(source.key, source.indexes, fingerprint, admission, grouped)
        if not any(len(part) for part in admission.numbers):
            raise DataError(
                source.key,
                None,
                f": no sample of {len(source.indexes)} shards (first: '{source.shards[0]}') can be used; "
                f"{sum(self.filtered.values())} are too long, {len(self._faults)} are faulty",
            )
        similar = grouped and batch_size > 1 and bool(admission.lengths)
        return EpochOrder(
            admission.numbers,
            seed=seed,
            shuffle=self.settings.shuffle,
            window=self.settings.shuffle_buffer,
            lengths=admission.lengths if similar else None,
            batch_size=batch_size if similar else 0,
            phase=phase,
        )

    def _draw(self, position: Position, count: int) -> tuple[list[Place], Position, int]:
        """Return up to `count` places to try, the position behind them, and the number of epochs that ended.

        All places are of one source and epoch. There are none if only quarantined samples are left in the epoch.

        Raises:
            DataError: the sources are used up.
        """
        source = self.sources[position.source]
        if source.num_samples and position.taken >= source.num_samples:
            if position.source + 1 == len(self.sources):
                raise DataError(
                    source.key,
                    None,
                    f": all sources are used up after {source.num_samples} samples of this last one; raise its "
                    "num_samples or set it to 0 (endless)",
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

    def _prefetch(self, count: int) -> None:
        """Start to decode this rank's share of the batch that is likely to come next."""
        if not self._prefetcher.limit:
            return
        try:
            places, _, _ = self._draw(self.position, count)
        except DataError:
            return
        self._prefetcher.begin([place for slot, place in enumerate(places) if slot % self.dp_size == self.dp_rank])

    def _decode(self, place: Place) -> Prompt | SampleIssue:
        return self._made(place, self.processor)

    def _parse(self, place: Place) -> Sample | SampleIssue:
        return self._made(place, lambda sample: sample)

    def _made(self, place: Place, make: Callable[[Sample], Made]) -> Made | SampleIssue:
        try:
            return make(parse_sample(read_entry(self.sources[place.source].indexes[place.shard], place.number)))
        except SampleError as error:
            return SampleIssue(error.reason, str(error))
        except Exception as error:  # decoders of foreign bytes may raise anything, and one sample must not end a run
            return SampleIssue("unusable", f"sample '{self._name(place)}': {type(error).__name__}: {error}")

    def _quarantine(self, place: Place, fault: SampleIssue) -> None:
        if fault.reason == "cannot_read":
            raise DataError(self.sources[place.source].key, None, f": {fault.text}")
        self._faults[self._name(place)] = fault
        self._unusable.add(place)
        if self.report:
            logger.warning("quarantined (%d so far): %s", len(self._faults), fault.text)

    def _fruitless(self) -> DataError:
        source = self.sources[self.position.source]
        return DataError(
            source.key,
            None,
            f": no usable sample in a whole epoch of {len(source.indexes)} shards (first: '{source.shards[0]}'); "
            f"{len(self._faults)} were quarantined",
        )

    def _name(self, place: Place) -> str:
        index = self.sources[place.source].indexes[place.shard]
        return f"{self._labels[index.shard]}/{printable(index.keys[place.number])}"

    def _identity(self, number: int) -> str:
        """Return a digest of a source's order: its samples, their shards and the settings of the order."""
        order, source = self._orders[number], self.sources[number]
        settings = order.seed, order.shuffle, order.window, order.batch_size, order.phase
        digest = blake2b(repr(settings).encode(), digest_size=16)
        for index, numbers in zip(source.indexes, order.numbers):
            digest.update(repr((PurePath(index.shard).name, len(index))).encode() + numbers.tobytes())
        for part in order.lengths or ():
            digest.update(part.tobytes())
        return digest.hexdigest()
