"""Run megatron-core and DeepSpeed on a machine without an accelerator. Installed only there; no GPU path changes.

megatron-core 0.16.1 writes `device="cuda"` and `torch.cuda.current_device()` into its schedules, its point-to-point
communication and its rotary embedding. DeepSpeed 0.19.8 looks for an accelerator when it is imported and warns; compiles
a shared-memory collective the first time it runs on CPU (a minute, needs a compiler); and counts "devices" by starting
`numactl` at every gradient reduction. `tests/unit/test_compat.py` fails once these lines are no longer needed.
"""

import importlib
import os
import types

import torch


class _CpuTorch(types.ModuleType):
    """`torch` as megatron's schedules see it: factory calls that name device "cuda" land on the CPU."""

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
    """Tell DeepSpeed that this machine has no accelerator, where it has none. Call before DeepSpeed is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))


def install() -> None:
    """Redirect what megatron-core and DeepSpeed would do on CUDA. Idempotent; refuses where CUDA is available."""
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
    # By name: the attribute `deepspeed.comm.torch` is torch itself.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
