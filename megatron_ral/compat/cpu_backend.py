"""Run megatron-core and DeepSpeed on a machine without an accelerator.

The redirections are installed only on such a machine, so that no path on a GPU changes.

- megatron-core writes `device="cuda"` and `torch.cuda.current_device()` into its schedules, its point-to-point
  communication and its rotary embedding.
- DeepSpeed looks for an accelerator when it is imported, and warns if there is none.
- DeepSpeed compiles a shared-memory collective when it first runs on the CPU, which takes a minute and a compiler.
- DeepSpeed starts `numactl` at every gradient reduction to count devices, unless `LOCAL_SIZE` is set.

Tried on: megatron-core 0.16.1, 0.17.1, 0.18.2 and 0.19.2; DeepSpeed 0.19.8.
Retired by: `test_megatron_schedules_still_name_cuda`, `test_deepspeed_still_compiles_a_collective_on_cpu`.
"""

import importlib
import os
import types
from typing import Any

import torch


class _CpuTorch(types.ModuleType):
    """Stand-in for `torch` in megatron-core's schedules: tensors made for device "cuda" are made on the CPU."""

    def __init__(self):
        super().__init__("torch")

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def zeros(*args, **kwargs):
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return torch.zeros(*args, **kwargs)


_installed = False


def choose_deepspeed_accelerator() -> None:
    """Tell DeepSpeed to use the CPU on a machine without an accelerator. Call this before importing DeepSpeed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))


def install() -> None:
    """Redirect the CUDA calls of megatron-core and DeepSpeed to the CPU. Later calls do nothing.

    Raises:
        AssertionError: the machine has an accelerator.
    """
    global _installed
    assert not torch.cuda.is_available(), "cpu_backend must not be installed on a machine with an accelerator"
    if _installed:
        return
    _installed = True
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = lambda *args, **kwargs: None

    from megatron.core.pipeline_parallel import schedules

    schedules.torch = _CpuTorch()

    choose_deepspeed_accelerator()
    # Imported by name because the attribute `deepspeed.comm.torch` is torch itself.
    collectives: Any = importlib.import_module("deepspeed.comm.torch")
    collectives.build_shm_op = lambda: None
