"""Work handed from one layout of the ranks to another, and its results back.

Two layouts of the same ranks (a student's and its teacher's) see different data-parallel ranks. `Assignment` says which
replica of the second layout takes which item of the first; from it every rank derives the same list of `Transfer`s, of
which it carries out its own part. What is already where it is needed is not sent.
"""

import pickle
from dataclasses import dataclass
from typing import Any, Callable, Hashable, Mapping, NamedTuple, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ral.parallel.rank_layout import RankLayout

Item = tuple[int, int]
"""(data-parallel rank of the first layout, number of the item there)."""


class Transfer(NamedTuple):
    """One thing that goes from one rank to another (or stays, where they are the same)."""

    source: int
    target: int
    what: Hashable


@dataclass(frozen=True)
class Assignment:
    """Items of the data-parallel ranks of layout `home`, spread evenly and in order over the replicas of layout `away`.

    Every rank of one home replica (all its tensor ranks and stages) holds the same items; every rank of the away
    replica that takes an item needs it.
    """

    home: RankLayout
    away: RankLayout
    counts: tuple[int, ...]
    """Items of each data-parallel rank of `home`."""

    def items(self) -> list[Item]:
        return [(data_rank, index) for data_rank, count in enumerate(self.counts) for index in range(count)]

    def replica(self, item: Item) -> int:
        """Data-parallel rank of `away` that takes an item."""
        data_rank, index = item
        return (sum(self.counts[:data_rank]) + index) * self.away.data_size // sum(self.counts)

    def taken(self) -> list[Item]:
        """Items of this rank's away replica."""
        return [item for item in self.items() if self.replica(item) == self.away.data_rank]

    def inputs(self) -> list[Transfer]:
        """Each item to all ranks of the replica that takes it."""
        return [
            self._nearest(item, target, self._home_ranks(item[0]))
            for item in self.items()
            for target in self._away_ranks(self.replica(item))
        ]

    def answers(self) -> list[Transfer]:
        """Results that every rank of the away replica holds, to all ranks of the item's home."""
        return [
            self._nearest(item, target, self._away_ranks(self.replica(item)))
            for item in self.items()
            for target in self._home_ranks(item[0])
        ]

    def stage_results(self, name: Hashable, away_stage: int, home_stage: int) -> list[Transfer]:
        """Results that the tensor ranks of one away stage hold alike, to the tensor ranks of one home stage. What is sent
        is named (item, name)."""
        transfers = []
        for item in self.items():
            sources = [self.away.rank_of(rank, self.replica(item), away_stage) for rank in range(self.away.tensor_size)]
            for rank in range(self.home.tensor_size):
                target = self.home.rank_of(rank, item[0], home_stage)
                source = target if target in sources else sources[rank % len(sources)]
                transfers.append(Transfer(source, target, (item, name)))
        return transfers

    def _nearest(self, item: Item, target: int, sources: Sequence[int]) -> Transfer:
        return Transfer(target if target in sources else sources[0], target, item)

    def _home_ranks(self, data_rank: int) -> list[int]:
        return _replica_ranks(self.home, data_rank)

    def _away_ranks(self, data_rank: int) -> list[int]:
        return _replica_ranks(self.away, data_rank)


def _replica_ranks(layout: RankLayout, data_rank: int) -> list[int]:
    return [
        layout.rank_of(tensor, data_rank, stage)
        for stage in range(layout.pipeline_size)
        for tensor in range(layout.tensor_size)
    ]


def carry_tensors(
    transfers: Sequence[Transfer], rank: int, have: Mapping[Hashable, Tensor], empty: Callable[[Hashable], Tensor]
) -> dict[Hashable, Tensor]:
    """Carry out this rank's part of the transfers, all at once.

    Args:
        transfers: the same list on every rank.
        rank: this rank.
        have: tensors this rank sends or keeps, by name.
        empty: name -> tensor of the right shape, type and device to receive into.

    Returns:
        Name -> tensor, of those whose target this rank is.
    """
    result = {
        transfer.what: have[transfer.what]
        for transfer in transfers
        if transfer.source == rank and transfer.target == rank
    }
    operations, tags = [], {}
    for source, target, what in transfers:
        if source == target or rank not in (source, target):
            continue
        tag = tags[source, target] = tags.get((source, target), -1) + 1
        if rank == source:
            operations.append(dist.P2POp(dist.isend, have[what].contiguous(), target, tag=tag))
        else:
            result[what] = empty(what)
            operations.append(dist.P2POp(dist.irecv, result[what], source, tag=tag))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return result


def carry_objects(
    transfers: Sequence[Transfer], rank: int, have: Mapping[Hashable, Any], device: torch.device
) -> dict[Hashable, Any]:
    """`carry_tensors` for picklable objects of this job: their sizes first, then their bytes. What stays on its rank is
    handed on as it is."""
    away = [transfer for transfer in transfers if transfer.source != transfer.target]
    packed = {
        what: torch.frombuffer(bytearray(pickle.dumps(have[what])), dtype=torch.uint8).to(device)
        for what in {transfer.what for transfer in away if transfer.source == rank}
    }
    sizes = carry_tensors(
        away,
        rank,
        {what: torch.tensor([data.numel()], device=device) for what, data in packed.items()},
        lambda what: torch.zeros(1, dtype=torch.int64, device=device),
    )
    received = carry_tensors(
        away, rank, packed, lambda what: torch.empty(int(sizes[what]), dtype=torch.uint8, device=device)
    )
    kept = {
        transfer.what: have[transfer.what]
        for transfer in transfers
        if transfer.source == rank and transfer.target == rank
    }
    return kept | {what: pickle.loads(data.cpu().numpy().tobytes()) for what, data in received.items()}
