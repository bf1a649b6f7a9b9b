"""Move work from one layout of the ranks to another, and the results back.

A student and its teacher may be divided over the same ranks in different layouts. A sample then belongs to one
data-parallel rank of the first layout, `home`, and is processed by one data-parallel rank of the second, `away`.
`Assignment` decides which. Every rank derives the same list of `Transfer`s from it and carries out those that it takes
part in. Nothing is sent where source and target are the same rank.

A replica is the set of ranks that together hold one copy of a model: all tensor ranks and pipeline stages of one
data-parallel rank.
"""

import pickle
from dataclasses import dataclass
from typing import Any, Callable, Hashable, Mapping, NamedTuple, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ral.parallel.rank_layout import RankLayout

Item = tuple[int, int]
"""Data-parallel rank of the home layout, and index of a work item there."""


class Transfer(NamedTuple):
    """Movement of one value from one rank to another. Source and target may be the same rank."""

    source: int
    target: int
    what: Any
    """Name of the value, hashable."""


@dataclass(frozen=True)
class Assignment:
    """Distribution of work items over the replicas of another layout, evenly and in order.

    All ranks of a home replica hold the same items. All ranks of the away replica that processes an item need it.
    """

    home: RankLayout
    """Layout in which the items are held."""
    away: RankLayout
    """Layout in which the items are processed, over the same ranks."""
    counts: tuple[int, ...]
    """Number of items of each data-parallel rank of `home`."""

    def items(self) -> list[Item]:
        """Return all items in order."""
        return [(data_rank, index) for data_rank, count in enumerate(self.counts) for index in range(count)]

    def replica(self, item: Item) -> int:
        """Return the data-parallel rank of `away` that processes an item."""
        data_rank, index = item
        return (sum(self.counts[:data_rank]) + index) * self.away.data_size // sum(self.counts)

    def taken(self) -> list[Item]:
        """Return the items that this rank's away replica processes."""
        return [item for item in self.items() if self.replica(item) == self.away.data_rank]

    def inputs(self) -> list[Transfer]:
        """Return the transfers of each item to all ranks of the replica that processes it."""
        return [
            self._nearest(item, target, self._home_ranks(item[0]))
            for item in self.items()
            for target in self._away_ranks(self.replica(item))
        ]

    def answers(self) -> list[Transfer]:
        """Return the transfers of results to all ranks of each item's home replica.

        Every rank of the away replica must hold the result.
        """
        return [
            self._nearest(item, target, self._away_ranks(self.replica(item)))
            for item in self.items()
            for target in self._home_ranks(item[0])
        ]

    def stage_results(self, name: Hashable, away_stage: int, home_stage: int) -> list[Transfer]:
        """Return the transfers of results from the tensor ranks of one away stage to those of one home stage.

        All tensor ranks of the away stage must hold the same result. A value is named (item, `name`).

        Args:
            name: Name of the result.
            away_stage: 0-based pipeline stage of `away` that has the results.
            home_stage: 0-based pipeline stage of `home` that needs them.
        """
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
    transfers: Sequence[Transfer], rank: int, have: Mapping[Any, Tensor], empty: Callable[[Hashable], Tensor]
) -> dict[Hashable, Tensor]:
    """Carry out this rank's part of the transfers, all of them at once and without gradient.

    Args:
        transfers: The same list on every rank.
        rank: This rank.
        have: Tensors whose source is this rank, by name.
        empty: Function from a name to a tensor of the right shape, type and device to receive into.

    Returns:
        Tensors whose target is this rank, by name. Those whose source it is too are not copied.
    """
    result = _staying(transfers, rank, have)
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
    transfers: Sequence[Transfer], rank: int, have: Mapping[Any, Any], device: torch.device
) -> dict[Hashable, Any]:
    """Carry out this rank's part of the transfers of picklable objects: their sizes first, then their bytes.

    Args:
        transfers: The same list on every rank.
        rank: This rank.
        have: Objects whose source is this rank, by name.
        device: Device on which ranks communicate.

    Returns:
        Objects whose target is this rank, by name. Those whose source it is too are not copied.
    """
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
    return _staying(transfers, rank, have) | {
        what: pickle.loads(data.cpu().numpy().tobytes()) for what, data in received.items()
    }


def _staying(transfers: Sequence[Transfer], rank: int, have: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
    """Return the values whose source and target both are this rank."""
    return {what: have[what] for source, target, what in transfers if source == target == rank}
