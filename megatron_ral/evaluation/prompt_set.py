"""Held-out prompts: which samples an evaluation reads, which it leaves out, and the warnings before it starts."""

import itertools
import logging
from collections import Counter
from typing import Any, Iterator, Optional, Sequence

from megatron_ral.data.issues import SampleError
from megatron_ral.data.loader import Source
from megatron_ral.data.peers import ReplicaPeers
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.data.shards import parse_sample, shard_entries
from megatron_ral.errors import DataError
from megatron_ral.parallel.collectives import gather_from_all, gather_objects, raise_together
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.rollout.scoring import unused_rules
from megatron_ral.types import Prompt, Sample

logger = logging.getLogger(__name__)

NUM_INSPECTED = 64
"""Number of leading samples whose problem types are inspected before an evaluation."""


class PromptSet:
    """One data-parallel rank's share of the held-out prompts, decoded anew in each pass.

    The whole set is the first `limit` samples of the shards in file order. Each rank takes every `dp_size`-th of them,
    starting at `dp_rank`, so that the set does not depend on the number of ranks. Pictures and videos are decoded when
    their prompt is reached, so that a benchmark never lies decoded in memory. Unusable samples are left out with a
    warning and counted.

    Args:
        shards: Paths of the tar files.
        processor: Decoder and tokenizer of a sample.
        limit: Largest number of samples over all ranks, unusable ones included.
        dp_rank: Data-parallel rank of this process.
        dp_size: Number of data-parallel ranks.
        num_readers: Number of processes that read the same samples. With more than one, a failure that may concern one
            process alone (its disk, its memory) is raised instead of counted, because the ranks would otherwise differ.
        peers: Ranks of the replica, of which one decodes for all, and which read the set together. None: every process
            decodes for itself.
    """

    def __init__(
        self,
        shards: Sequence[str],
        processor: PromptProcessor,
        limit: int,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        num_readers: int = 1,
        peers: Optional[ReplicaPeers] = None,
    ):
        self.shards, self.processor, self.limit, self.num_readers = shards, processor, limit, num_readers
        self.dp_rank, self.dp_size, self.peers = dp_rank, dp_size, peers or ReplicaPeers()
        self.left_out: dict[tuple[str, str], str] = {}
        """Reason (one of `data.issues.REASONS`) by (shard, key) of each unusable sample that was reached so far."""

    def __iter__(self) -> Iterator[Prompt]:
        """Yield the usable prompts of this rank.

        Raises:
            DataError: With several readers, a shard that cannot be read.
            MemoryError: With several readers, a sample that does not fit into memory.
            RuntimeError: The network between the ranks of the replica failed.
        """
        for index, entry in enumerate(itertools.islice(shard_entries(self.shards, self.num_readers), self.limit)):
            if index % self.dp_size == self.dp_rank:
                try:
                    prompt = self.peers.make(_parse(entry), self.processor)
                except (SampleError, MemoryError) as error:  # others are none of the sample's, as of a lost peer
                    if isinstance(error, MemoryError) and self.num_readers > 1:
                        raise
                    place = (entry["__url__"], entry["__key__"])
                    if place not in self.left_out:
                        logger.warning("left out of the evaluation: %s", error)
                    self.left_out[place] = error.reason if isinstance(error, SampleError) else "unusable"
                else:
                    yield prompt

    def size(self, source: Source) -> int:
        """Return the number of this rank's samples that the headers of the shards do not rule out."""
        return len(range(self.dp_rank, min(_num_readable(source), self.limit), self.dp_size))


def read_prompts(
    shards: Sequence[str],
    processor: PromptProcessor,
    limit: int,
    *,
    dp_rank: int = 0,
    dp_size: int = 1,
    num_readers: int = 1,
    peers: Optional[ReplicaPeers] = None,
) -> list[Prompt]:
    """Return all prompts of a `PromptSet` with these arguments at once."""
    return list(
        PromptSet(shards, processor, limit, dp_rank=dp_rank, dp_size=dp_size, num_readers=num_readers, peers=peers)
    )


def check_any_prompt(prompts: PromptSet, process_groups: ProcessGroups) -> None:
    """Check that at least one held-out sample can be used. Every rank calls this before weights are loaded.

    Args:
        prompts: This rank's share of the set.
        process_groups: Process groups.

    Raises:
        AgreedError: No rank has a usable sample.
    """
    problem = None
    if not any(gather_from_all(next(iter(prompts), None) is not None)):
        reasons = Counter()
        for found in gather_objects(list(prompts.left_out.values()), process_groups.data):
            reasons.update(found)
        text = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "no sample is whole"
        problem = DataError(
            "data.eval_shards",
            None,
            f": none of the first {prompts.limit} samples of {len(prompts.shards)} shards (first: "
            f"'{prompts.shards[0]}') can be used ({text}), so that there is nothing to evaluate; the warnings above "
            "name them",
        )
    raise_together(problem)


def _parse(entry: dict[str, Any]) -> Sample:
    """Return the sample of an entry. Every error but one of memory is a SampleError."""
    try:
        return parse_sample(entry)
    except (SampleError, MemoryError):
        raise
    except Exception as error:  # parsers of foreign bytes may raise anything
        raise SampleError(str(error)) from error


def _num_readable(source: Source) -> int:
    return sum(len(index) - len(index.faults) for index in source.indexes)


def warn_about_prompts(source: Source, limit: int, accuracy: str) -> None:
    """Log a warning where the limit cuts the set, or where answers are matched as text although their types have rules.

    Args:
        source: Held-out shards.
        limit: logging.num_eval_prompts.
        accuracy: reward.accuracy.
    """
    if (num_readable := _num_readable(source)) > limit:
        logger.warning(
            "only the first %d of %d samples are evaluated; logging.num_eval_prompts=%d takes all",
            limit,
            num_readable,
            num_readable,
        )
    types = []
    for entry in itertools.islice(shard_entries(source.shards), NUM_INSPECTED):
        try:
            types.append(parse_sample(entry).problem_type)
        except SampleError:
            continue
    if unused := unused_rules(types, accuracy):
        logger.warning(
            "reward.accuracy=exact: answers are matched as text, although problem types of the data have rules of "
            "their own (%s); reward.accuracy=by_type scores by these rules",
            ", ".join(unused),
        )


def left_out_by_reason(source: Source, prompts: PromptSet, process_groups: ProcessGroups) -> dict[str, int]:
    """Return the number of unusable samples over all ranks by reason, the most frequent reason first.

    Samples that the headers of the shards rule out are counted over the whole source, others as far as `prompts` was
    read. Every data-parallel rank calls this and gets the same result.
    """
    reasons = Counter(fault.reason for index in source.indexes for fault in index.faults.values())
    reasons["truncated"] += sum(
        bool(index.damage) and "truncated" not in {fault.reason for fault in index.faults.values()}
        for index in source.indexes
    )
    for found in gather_objects(list(prompts.left_out.values()), process_groups.data):
        reasons.update(found)
    return {reason: count for reason, count in reasons.most_common() if count}
