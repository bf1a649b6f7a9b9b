"""Collectives with the names and defaults that this project needs.

Every function states whether its result carries gradient, and runs no collective in a group of one rank.
"""

from typing import Any, Callable, Iterator, Mapping, Optional, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ral.errors import AgreedError, UserError
from megatron_ral.parallel.process_groups import ProcessGroups

MAXIMUM = ":max"
"""End of the name of a metric whose largest value over ranks is taken in place of the sum."""
_SENT_TYPES = (torch.uint8, torch.bool, torch.int64, torch.int32, torch.float32, torch.bfloat16, torch.float64)
"""Types of tensors that `broadcast_in_replica` sends."""
_ALIGNMENT = 8
"""Multiple of bytes at which a tensor of any type may begin."""


def all_reduce_sum_(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum a tensor over the group, in place and without gradient. Return the tensor."""
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def all_reduce_max_(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Take the maximum of a tensor over the group, in place and without gradient. Return the tensor."""
    if group.size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def largest_of_all(value: int, process_groups: ProcessGroups) -> int:
    """Return the largest value over all ranks of the job.

    Args:
        value: This rank's number, which must fit into int32.
        process_groups: Process groups, for the device on which ranks communicate.
    """
    number = torch.tensor(value, dtype=torch.int32, device=process_groups.device)
    return int(all_reduce_max_(number, _all_ranks()))


def gather_shards(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Return the tensors of all ranks, which have equal shapes, in group order and without gradient."""
    if group.size() == 1:
        return [tensor]
    shards = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(shards, tensor.contiguous(), group=group)
    return shards


def shards_in_turn(tensor: Tensor, group: dist.ProcessGroup) -> Iterator[Tensor]:
    """Yield the tensors of all ranks, which have equal shapes, in group order and without gradient.

    One rank's tensor is in memory at a time beside this rank's own. Every rank of the group takes all of them, and is
    done with one before it asks for the next.
    """
    if group.size() == 1:
        yield tensor
        return
    own, buffer = tensor.contiguous(), torch.empty_like(tensor, memory_format=torch.contiguous_format)
    for rank in dist.get_process_group_ranks(group):
        shard = own if rank == dist.get_rank() else buffer
        dist.broadcast(shard, src=rank, group=group)
        yield shard


def gather_rows(rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Return the rows of all ranks, one rank after the other, with gradient.

    Every rank must go on with all rows in the same way, so that the gradient of the result is equal on all ranks. A
    rank then takes the gradient of its own rows, and nothing is sent backwards.

    Args:
        rows: Rows of this rank, [n, ...].
        counts: Number of rows of every rank, equal on all ranks.
        group: Process group.
    """
    return _GatherRows.apply(rows, counts, group) if group.size() > 1 and any(counts) else rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.rank = counts, group.rank()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])  # gloo gathers equal shapes alone
        padded[: len(rows)] = rows
        return torch.cat([part[:count] for part, count in zip(gather_shards(padded, group), counts)])

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.split(ctx.counts)[ctx.rank], None, None


def gather_objects(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Return the values of all ranks, small picklable objects, in group order on every rank."""
    if dist.get_world_size(group) == 1:
        return [value]
    result: list[Any] = [None] * group.size()
    dist.all_gather_object(result, value, group=group)
    return result


def gather_from_all(value: Any) -> list[Any]:
    """Return the values of all ranks of the job, small picklable objects, in rank order on every rank."""
    return gather_objects(value, _all_ranks())


def from_first_rank(make: Callable[[], Any], group: dist.ProcessGroup) -> Any:
    """Call `make` on the group's first rank only, and return its result (small, picklable) on every rank.

    Raises:
        AgreedError: on the other ranks, if `make` raised on the first one. They would wait for its result otherwise.
    """
    if group.size() == 1:
        return make()
    first = dist.get_process_group_ranks(group)[0]
    result_and_error: list[Any] = [None, None]
    failure: Optional[Exception] = None
    if dist.get_rank() == first:
        try:
            result_and_error[0] = make()
        except Exception as error:
            failure, result_and_error[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(result_and_error, src=first, group=group)
    result, text = result_and_error
    if text is not None:
        raise failure or AgreedError(text, rank=first)
    return result


def from_first_rank_of_all(make: Callable[[], Any]) -> Any:
    """Call `make` on the first rank of the job only, and return its result everywhere, like `from_first_rank`."""
    return from_first_rank(make, _all_ranks())


def broadcast_from_stage_(tensor: Tensor, stage: int, process_groups: ProcessGroups) -> Tensor:
    """Broadcast a tensor from one pipeline stage to all others, in place and without gradient. Return the tensor.

    Args:
        tensor: Tensor of the same shape and type on every stage.
        stage: 0-based stage that has the values. Negative numbers count from the last stage.
        process_groups: Process groups.
    """
    if process_groups.layout.pipeline_size > 1:
        dist.broadcast(tensor, src=_rank_of_stage(stage, process_groups), group=process_groups.pipeline)
    return tensor


def is_first_of_replica(process_groups: ProcessGroups) -> bool:
    """Return whether this rank is the first of those that hold one copy of the model."""
    return _first_of_replica(process_groups) == dist.get_rank()


def broadcast_in_replica(lists: Sequence[Sequence[Tensor]], process_groups: ProcessGroups) -> list[list[Tensor]]:
    """Send lists of tensors from the first rank of a replica (tensor x pipeline) to all its ranks, without gradient.

    Types and shapes are sent ahead of the bytes. One list is in flight at a time.

    Args:
        lists: Tensors in host memory, of a type in `_SENT_TYPES`. Ignored on ranks other than the first.
        process_groups: Process groups.

    Returns:
        The lists, equal on every rank of the replica, in host memory.
    """
    group, first, device = process_groups.model, _first_of_replica(process_groups), process_groups.device
    if group.size() == 1:
        return [list(tensors) for tensors in lists]

    def send(tensor: Tensor) -> Tensor:
        placed = tensor.to(device)
        dist.broadcast(placed, src=first, group=group)
        return placed.cpu()

    is_first = dist.get_rank() == first
    header = [len(lists)] if is_first else []
    for tensors in lists if is_first else ():
        header.append(len(tensors))
        for tensor in tensors:
            header += [_SENT_TYPES.index(tensor.dtype), tensor.dim(), *tensor.shape]
    length = int(send(torch.tensor(len(header))))
    numbers = iter(send(torch.tensor(header) if is_first else torch.empty(length, dtype=torch.int64)).tolist())
    result = []
    for place in range(next(numbers)):
        parts = []
        for _ in range(next(numbers)):
            dtype, shape = _SENT_TYPES[next(numbers)], [next(numbers) for _ in range(next(numbers))]
            size = dtype.itemsize * torch.Size(shape).numel()
            parts.append((dtype, shape, size, size + -size % _ALIGNMENT))
        packed = torch.empty(sum(padded for *_, padded in parts), dtype=torch.uint8)
        if is_first:
            for own, tensor in zip(packed.split([padded for *_, padded in parts]), lists[place]):
                own[: tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
        packed = send(packed)
        pieces = zip(parts, packed.split([padded for *_, padded in parts]))
        # Each has memory of its own, because a view that is saved or sent takes all that it is a part of with it.
        result.append([piece[:size].clone().view(dtype).view(shape) for (dtype, shape, size, _), piece in pieces])
    return result


def send_to_stage(tensor: Tensor, stage: int, process_groups: ProcessGroups) -> dist.Work:
    """Start sending a contiguous tensor to the rank of another stage (0-based) with the same tensor and data rank.

    The tensor must not change until the returned work has been waited for.
    """
    return _started(dist.isend(tensor, dst=_rank_of_stage(stage, process_groups), group=process_groups.pipeline))


def receive_from_stage(tensor: Tensor, stage: int, process_groups: ProcessGroups) -> dist.Work:
    """Start filling `tensor` from the rank of another stage (0-based) with the same tensor and data rank.

    The tensor is valid once the returned work has been waited for.
    """
    return _started(dist.irecv(tensor, src=_rank_of_stage(stage, process_groups), group=process_groups.pipeline))


def wait(work: dist.Work) -> None:
    """Wait for a transfer.

    This is a function of its own because the watchdog reports the names of the functions that a thread is in.
    """
    work.wait()


def sum_metrics(metrics: Mapping[str, Tensor | float], process_groups: ProcessGroups) -> dict[str, float]:
    """Sum named scalars over data-parallel ranks and pipeline stages. Of a name that ends with `:max` take the largest.

    Copies on tensor-parallel ranks count once. A metric counts as zero on the ranks that do not have it: only the last
    stage has token losses, only one stage has the attention of a layer, and a data-parallel rank may have no samples.
    Values whose largest is taken are therefore never negative.

    Args:
        metrics: Scalars of this rank by name.
        process_groups: Process groups.

    Returns:
        Sums and maxima in float64 by name, equal on every rank.
    """
    names = sorted(set().union(*gather_from_all(sorted(metrics))))
    if not names:
        return {}
    numbers = (torch.as_tensor(metrics.get(name, 0.0), dtype=torch.float64) for name in names)
    values = torch.stack([number.to(process_groups.device, non_blocking=True) for number in numbers])
    maxima = [index for index, name in enumerate(names) if name.endswith(MAXIMUM)]
    largest = values[maxima] if maxima else None
    all_reduce_sum_(values, process_groups.pipeline)
    all_reduce_sum_(values, process_groups.data)
    if largest is not None:
        all_reduce_max_(largest, process_groups.pipeline)
        values[maxima] = all_reduce_max_(largest, process_groups.data)
    return dict(zip(names, values.tolist()))


def raise_together(problem: Optional[Exception]) -> None:
    """Raise on every rank if any rank has a problem.

    Every rank calls this after a check that precedes a collective, because a rank that raised alone would leave the
    others waiting.

    Args:
        problem: Error of this rank, or None.

    Raises:
        AgreedError: on every rank, with the parts of the first rank's error. Its text begins with `rank N:` unless all
            ranks have the same error.
    """
    reports = gather_from_all(None if problem is None else (str(problem), _parts(problem)))
    failed = [rank for rank, report in enumerate(reports) if report is not None]
    if failed:
        text, parts = reports[failed[0]]
        alike = len(failed) == len(reports) and all(report[0] == text for report in reports)
        raise AgreedError(*parts, rank=None if alike else failed[0]) from problem


def barrier() -> None:
    """Wait until every rank of the job has come here. Return at once where no job was joined."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _parts(problem: Exception) -> tuple[str, object, str]:
    """Return key, value and remedy of an error. The text of a foreign error, or one with a rank, is all remedy."""
    if isinstance(problem, UserError) and getattr(problem, "rank", None) is None:
        return problem.key, problem.value, problem.remedy
    return "", None, str(problem)


def _all_ranks() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "no job was joined"
    return group


def _first_of_replica(process_groups: ProcessGroups) -> int:
    return dist.get_process_group_ranks(process_groups.model)[0]


def _rank_of_stage(stage: int, process_groups: ProcessGroups) -> int:
    return dist.get_process_group_ranks(process_groups.pipeline)[stage]


def _started(work: Optional[dist.Work]) -> dist.Work:
    assert work is not None, "this rank is not in the group"
    return work
