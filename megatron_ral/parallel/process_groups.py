# As torch.distributed lists no exports:
# pyright: reportPrivateImportUsage=false
"""Process groups: created once per process and layout, and passed down as one object."""

import os
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Iterator, Mapping, Optional

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ral.compat import cpu_backend, cuda_fakes
from megatron_ral.compat.model_layouts import layout_globals, no_layout, use_layout
from megatron_ral.parallel.rank_layout import RankLayout


@dataclass(frozen=True)
class ProcessGroups:
    """Layout, device and process groups of this rank."""

    layout: RankLayout
    """Place of this rank among all ranks."""
    device: torch.device
    """Device on which this rank computes and communicates."""
    tensor: dist.ProcessGroup
    """Ranks that share the layers of one pipeline stage (tensor parallelism)."""
    pipeline: dist.ProcessGroup
    """Ranks that hold consecutive layers, in the order of the stages."""
    data: dist.ProcessGroup
    """Ranks that hold the same parameters for different samples (data parallelism, ZeRO-3)."""
    model: dist.ProcessGroup
    """Ranks that together hold one copy of the model: tensor x pipeline."""
    embedding: Optional[dist.ProcessGroup]
    """First and last stage, which both hold tied embeddings; None on stages between them and without a pipeline."""
    globals: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Module globals in which megatron-core holds this layout (see `compat.model_layouts`)."""

    def active(self) -> AbstractContextManager[None]:
        """Make megatron-core use this layout inside a `with` block. A process may hold several layouts."""
        return use_layout(self.globals)


def default_device() -> torch.device:
    """Return this process's accelerator, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def start_groups(*, tensor_size: int, pipeline_size: int, seed: int, timeout_minutes: int = 30) -> ProcessGroups:
    """Join the job and create all process groups.

    The job is read from the environment that torchrun sets. A single process without that environment becomes a job of
    its own. A machine without an accelerator uses the gloo backend and `compat/cpu_backend.py`.

    Args:
        tensor_size: Number of tensor-parallel ranks.
        pipeline_size: Number of pipeline stages.
        seed: Seed of torch's global random number generator.
        timeout_minutes: Minutes after which a collective fails.
    """
    device = default_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        _choose_kernels()
    else:
        cpu_backend.install()
    if not dist.is_initialized():
        backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(minutes=timeout_minutes)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # a store in memory: no port that another process might take
            for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
                os.environ.setdefault(name, value)
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            # Without `device_id`, because with it torch uses one communicator per group and orders transfers between
            # two ranks behind all others: a send of one batch would wait for a receive of the next (pytorch#154132).
            dist.init_process_group(backend, timeout=timeout)
    torch.manual_seed(seed)
    return _build(tensor_size, pipeline_size, device, timeout_minutes)


def _choose_kernels() -> None:
    """Switch off kernels of a GPU that are wrong, or that round more than the rest of a step.

    cuDNN's attention is what torch prefers on H100. Its backward pass with a mask can give NaN (pytorch#196678), and it
    makes a plan for every new shape, which takes 0.05 to 0.5 s; micro-batches have new shapes all the time. cuBLAS may
    add partial sums of a product in bfloat16, which log-probabilities show.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def another_layout(
    process_groups: ProcessGroups, *, tensor_size: int, pipeline_size: int, timeout_minutes: int = 30
) -> ProcessGroups:
    """Create the process groups of a second layout over the same ranks. The first layout stays in use.

    Args:
        process_groups: First layout.
        tensor_size: Number of tensor-parallel ranks of the second layout.
        pipeline_size: Number of pipeline stages of the second layout.
        timeout_minutes: Minutes after which a collective fails.

    Returns:
        `process_groups` itself if both layouts are the same.
    """
    layout = process_groups.layout
    if (tensor_size, pipeline_size) == (layout.tensor_size, layout.pipeline_size):
        return process_groups
    with no_layout():
        return _build(tensor_size, pipeline_size, process_groups.device, timeout_minutes)


def _build(tensor_size: int, pipeline_size: int, device: torch.device, timeout_minutes: int) -> ProcessGroups:
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_size,
            pipeline_model_parallel_size=pipeline_size,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timeout_minutes,
        )
    layout = RankLayout(dist.get_rank(), dist.get_world_size(), tensor_size, pipeline_size)
    assert layout.tensor_rank == parallel_state.get_tensor_model_parallel_rank()
    assert layout.data_rank == parallel_state.get_data_parallel_rank()
    assert layout.pipeline_rank == parallel_state.get_pipeline_model_parallel_rank()
    has_embeddings = pipeline_size > 1 and (layout.is_first_stage or layout.is_last_stage)
    return ProcessGroups(
        layout=layout,
        device=device,
        tensor=_group(parallel_state.get_tensor_model_parallel_group()),
        pipeline=_group(parallel_state.get_pipeline_model_parallel_group()),
        data=_group(parallel_state.get_data_parallel_group()),
        model=_group(parallel_state.get_model_parallel_group()),
        embedding=_group(parallel_state.get_embedding_group()) if has_embeddings else None,
        globals=layout_globals(),
    )


def _group(group: Any) -> dist.ProcessGroup:
    assert isinstance(group, dist.ProcessGroup), "megatron-core has one group of each kind for a dense model"
    return group


def stop_groups() -> None:
    """Leave the job. A process may join another one afterwards, as tests do."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def simulate_rank(
    rank: int, world_size: int, *, tensor_size: int, pipeline_size: int, on_gpu: bool = False
) -> Iterator[ProcessGroups]:
    """Yield the process groups of one rank of a job that does not run, for rehearsals of a launch.

    Collectives return at once and move nothing. The process must have no accelerator and must not have joined a job.

    Args:
        rank: Simulated rank.
        world_size: Number of ranks of the simulated job.
        tensor_size: Number of tensor-parallel ranks.
        pipeline_size: Number of pipeline stages.
        on_gpu: True for a device on which only fake tensors can lie (`compat/cuda_fakes.py`), False for the CPU. A
            process can simulate one of them.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

    assert not dist.is_initialized(), "a rank can be simulated only in a process that has joined no job"
    device = torch.device("cpu")
    if on_gpu:
        cpu_backend.choose_deepspeed_accelerator()
        device = cuda_fakes.install()
    else:
        cpu_backend.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield _build(tensor_size, pipeline_size, device, 30)
    finally:
        stop_groups()
