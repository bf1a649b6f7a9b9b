"""Device work that is recorded once as a CUDA graph and then started with one launch.

A decoding step of a large model is a few thousand small kernels, and a host that starts each of them from Python takes
several times as long as the device needs. The work must read and write the same tensors every time, and must not wait
for the device.
"""

from typing import Callable, Generic, TypeVar

import torch

Result = TypeVar("Result")


class Recorded(Generic[Result]):
    """Work whose result lies in the same memory after every call.

    Args:
        work: function without arguments. It must have run before with tensors of the same shapes, because libraries set
            themselves up in their first call.
    """

    def __init__(self, work: Callable[[], Result]):
        self._graph = torch.cuda.CUDAGraph()
        # Other threads decode pictures meanwhile, and may ask for page-locked memory.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = work()

    def __call__(self) -> Result:
        """Start the work and return its result, which the next call overwrites."""
        self._graph.replay()
        return self._result


def can_record(device: torch.device) -> bool:
    """Say whether work on a device can be recorded."""
    return device.type == "cuda"
