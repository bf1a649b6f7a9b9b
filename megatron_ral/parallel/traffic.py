"""Count the collectives of a process: calls and bytes by process group, observed where torch dispatches them.

Bytes are those of the whole buffer: the output of an all-gather, the input of a reduce-scatter or all-reduce, the
message of a point-to-point call. A ring moves (N - 1) / N of that per rank, and twice as much for an all-reduce.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Mapping

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
    "alltoall_": "all-to-all",
    "alltoall_base_": "all-to-all",
    "gather_": "gather",
    "scatter_": "scatter",
    "barrier": "barrier",
}
"""Name of torch's c10d operator -> kind of collective in a table."""


@dataclass
class Traffic:
    """Calls and bytes by (name of the process group, kind of collective)."""

    calls: Counter = field(default_factory=Counter)
    """Number of calls."""
    sent_bytes: Counter = field(default_factory=Counter)
    """Number of bytes, as the module counts them."""

    def of(self, group: str) -> dict[str, tuple[int, int]]:
        """Return kind -> (calls, bytes) of one process group."""
        return {
            kind: (self.calls[key], self.sent_bytes[key])
            for key in sorted(self.calls)
            for name, kind in [key]
            if name == group
        }


class CountedTraffic(TorchDispatchMode):
    """Context that counts every collective of this process. `with CountedTraffic(...) as traffic` yields a `Traffic`.

    Args:
        groups: Process groups by the name to count them under. Other groups are counted as "other". Two groups over the
            same ranks are counted apart.
    """

    def __init__(self, groups: Mapping[str, dist.ProcessGroup]):
        super().__init__()
        self.traffic = Traffic()
        self._names: dict[str, str] = {group.group_name: name for name, group in groups.items()}

    def __enter__(self) -> Any:
        super().__enter__()
        return self.traffic

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func.namespace == "c10d" and (kind := KINDS.get(func._opname)):
            group = next(
                (
                    arg
                    for arg in (*args, *(kwargs or {}).values())
                    if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())
                ),
                None,
            )
            name = dist.ProcessGroup.unbox(group).group_name if group is not None else ""
            tensors = [tensor for arg in args for tensor in _tensors(arg)]
            size = max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
            if func._opname in ("allgather_", "reduce_scatter_", "allreduce_coalesced_"):  # lists of equal shards
                size = max(sum(t.numel() * t.element_size() for t in _tensors(arg)) for arg in args)
            key = self._names.get(name, "other"), kind
            self.traffic.calls[key] += 1
            self.traffic.sent_bytes[key] += size
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []
