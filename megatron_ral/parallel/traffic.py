"""What is sent: calls and bytes of every collective, by process group, seen where torch dispatches them.

Bytes are those of the whole buffer: what an all-gather makes, what a reduce-scatter or all-reduce is given, what a
point-to-point call sends. (A ring moves (N - 1) / N of that per rank, an all-reduce twice.)
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


@dataclass
class Traffic:
    """Calls and bytes by (group, kind)."""

    calls: Counter = field(default_factory=Counter)
    sent_bytes: Counter = field(default_factory=Counter)

    def of(self, group: str) -> dict[str, tuple[int, int]]:
        """kind -> (calls, bytes) of one group."""
        return {
            kind: (self.calls[key], self.sent_bytes[key])
            for key in sorted(self.calls)
            for name, kind in [key]
            if name == group
        }


class CountedTraffic(TorchDispatchMode):
    """Counts every collective of this process inside a `with`, into the Traffic it is entered as.

    Args:
        groups: name -> process group; what runs in another group is counted under "other". Groups that hold the same
            ranks but were made apart are told apart.
    """

    def __init__(self, groups: Mapping[str, dist.ProcessGroup]):
        super().__init__()
        self.traffic = Traffic()
        self._names = {group.group_name: name for name, group in groups.items()}

    def __enter__(self) -> Traffic:
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
            if func._opname in ("allgather_", "reduce_scatter_", "allreduce_coalesced_"):  # lists of equal parts
                size = max(sum(t.numel() * t.element_size() for t in _tensors(arg)) for arg in args)
            key = self._names.get(name, "other"), kind
            self.traffic.calls[key] += 1
            self.traffic.sent_bytes[key] += size
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []
