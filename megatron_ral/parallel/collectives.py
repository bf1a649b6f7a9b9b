"""Collectives: thin, named by what they are for, the autograd rule stated."""

from typing import Any, Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ral.errors import AgreedError
from megatron_ral.parallel.process_groups import ProcessGroups


def all_reduce_sum_(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """In-place sum without gradient."""
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def all_reduce_max_(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """In-place maximum without gradient."""
    if group.size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def largest_of_all(value: int, process_groups: ProcessGroups) -> int:
    """Largest of every rank's small number, of the whole job."""
    number = torch.tensor(value, dtype=torch.int32, device=process_groups.device)
    return int(all_reduce_max_(number, dist.group.WORLD))


def gather_shards(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Every rank's tensor (equal shapes), in group order; no gradient."""
    if group.size() == 1:
        return [tensor]
    shards = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(shards, tensor.contiguous(), group=group)
    return shards


def gather_objects(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's (small, picklable) object, in group order, on every rank."""
    if dist.get_world_size(group) == 1:
        return [value]
    result: list[Any] = [None] * group.size()
    dist.all_gather_object(result, value, group=group)
    return result


def from_first_rank(make: Callable[[], Any], group: dist.ProcessGroup) -> Any:
    """What `make` returns (small, picklable) on the group's first rank, which alone calls it, on every rank.

    Raises:
        AgreedError: on the other ranks, where `make` raised on the first; they would wait for it in vain.
    """
    if group.size() == 1:
        return make()
    first = dist.get_process_group_ranks(group)[0]
    box, failure = [None, None], None
    if dist.get_rank() == first:
        try:
            box[0] = make()
        except Exception as error:
            failure, box[1] = error, f"rank {first}: {type(error).__name__}: {error}"
    dist.broadcast_object_list(box, src=first, group=group)
    if box[1] is not None:
        raise failure or AgreedError(box[1])
    return box[0]


def from_first_rank_of_all(make: Callable[[], Any]) -> Any:
    """`from_first_rank` of the whole job."""
    return from_first_rank(make, dist.group.WORLD)


def gather_from_all(value: Any) -> list[Any]:
    """Every rank's (small, picklable) object of the whole job, in rank order, on every rank."""
    return gather_objects(value, dist.group.WORLD)


def broadcast_from_stage_(tensor: Tensor, stage: int, process_groups: ProcessGroups) -> Tensor:
    """In-place broadcast from pipeline stage `stage` (negative: from the end) to all stages."""
    if process_groups.layout.pipeline_size > 1:
        dist.broadcast(
            tensor, src=dist.get_process_group_ranks(process_groups.pipeline)[stage], group=process_groups.pipeline
        )
    return tensor


def send_to_stage(tensor: Tensor, stage: int, process_groups: ProcessGroups) -> dist.Work:
    """Start sending a contiguous tensor to the same tensor and data rank of another pipeline stage (0-based). The
    tensor must not change until the work is waited for."""
    return dist.isend(
        tensor, dst=dist.get_process_group_ranks(process_groups.pipeline)[stage], group=process_groups.pipeline
    )


def receive_from_stage(tensor: Tensor, stage: int, process_groups: ProcessGroups) -> dist.Work:
    """Start filling `tensor` with what another pipeline stage sends; valid once the work is waited for."""
    return dist.irecv(
        tensor, src=dist.get_process_group_ranks(process_groups.pipeline)[stage], group=process_groups.pipeline
    )


def sum_metrics(metrics: Mapping[str, Tensor | float], process_groups: ProcessGroups) -> dict[str, float]:
    """Sum named scalars over data-parallel ranks and pipeline stages, counting tensor-parallel copies once.

    A metric that only some stages produce (token losses on the last, attention on its layer's owner) counts as zero
    elsewhere, and so does one on a data-parallel rank that had nothing to do. Every rank gets the same result.
    """
    names = sorted(set().union(*gather_objects(sorted(metrics), dist.group.WORLD)))
    values = torch.tensor([float(metrics.get(name, 0.0)) for name in names], dtype=torch.float64)
    if process_groups.device.type != "cpu":
        values = values.to(process_groups.device)
    all_reduce_sum_(values, process_groups.pipeline)
    all_reduce_sum_(values, process_groups.data)
    return dict(zip(names, values.tolist()))


def raise_together(problem: Exception | None) -> None:
    """End all ranks where one has a problem: raises AgreedError with its text on every rank.

    For checks that every rank makes before a collective: a rank that raised alone would leave its peers waiting.
    """
    texts = gather_objects(None if problem is None else str(problem), dist.group.WORLD)
    found = {text: rank for rank, text in reversed(list(enumerate(texts))) if text is not None}
    if found:
        text, rank = next(reversed(found.items()))
        raise AgreedError(text if None not in texts and len(found) == 1 else f"rank {rank}: {text}") from problem


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def wait(work: dist.Work) -> None:
    """Wait for something sent or received; the name tells the watchdog what the thread is at."""
    work.wait()
