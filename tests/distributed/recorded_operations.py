"""A CUDA graph on the CPU: operators are recorded once and then run again on the same tensors.

A replay runs no Python of the recorded work. It is therefore right only where the work reads and writes the same memory
every time and takes nothing from the host, which is what a CUDA graph needs.
"""

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from megatron_ral.planning.gpu_work import tensors_in, wait_of


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "aten":
            wait = wait_of(func._opname, args, kwargs, result)
            assert wait is None, f"{func} would wait for the device ({wait}), which a graph cannot hold"
        self.operators.append((func, args, kwargs, list(tensors_in(result))))
        return result


class RecordedOperations:
    """Stand-in for `engine.decode_graph.Recorded`."""

    made = replays = 0
    """How many were made, and how often they ran again."""

    def __init__(self, work):
        with _Recorder() as recorder:
            self.result = work()
        self.operators = recorder.operators
        type(self).made += 1

    def __call__(self):
        first = self.result
        for func, args, kwargs, kept in self.operators:
            if not func._schema.is_mutable and (_is_view(func, args, kwargs, kept) or "empty" in func._opname):
                continue  # of what has been written again, or without contents
            again = func(*args, **kwargs)
            for value in tree_flatten(again)[0]:
                if isinstance(value, torch.ScriptObject):
                    dist.Work.unbox(value).wait()
            for tensor, new in zip(kept, tensors_in(again)):
                if tensor.data_ptr() != new.data_ptr():
                    tensor.copy_(new)
        type(self).replays += 1
        return first


def _is_view(func, args, kwargs, kept):
    if func.namespace != "aten" or not kept:
        return False
    inputs = {_memory(value) for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)}
    named = any(returned.alias_info is not None for returned in func._schema.returns)
    return named or all(_memory(tensor) in inputs for tensor in kept)


def _memory(tensor):
    return tensor.untyped_storage()._cdata
