"""Process groups: started once per process, held in one object per layout that is passed down."""

import os
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Iterator, Mapping, Optional

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ral.compat.model_layouts import layout_globals, no_layout, use_layout
from megatron_ral.parallel.rank_layout import RankLayout


@dataclass(frozen=True)
class ProcessGroups:
    """Layout of this rank and its process groups."""

    layout: RankLayout
    device: torch.device
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    data: dist.ProcessGroup
    model: dist.ProcessGroup
    """Tensor x pipeline: the ranks that together hold one copy of the model."""
    embedding: Optional[dist.ProcessGroup]
    """First and last stage, where tied embeddings live twice; None on stages between and without pipeline."""
    globals: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What third parties keep of this layout in their modules."""

    def active(self) -> AbstractContextManager[None]:
        """Third parties work in this layout while inside (a job may hold several)."""
        return use_layout(self.globals)


def default_device() -> torch.device:
    """This process's accelerator, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def start_groups(*, tensor_size: int, pipeline_size: int, seed: int, timeout_minutes: int = 30) -> ProcessGroups:
    """Join the job (environment of torchrun; a lone process needs none) and build all groups.

    On a machine without an accelerator the gloo backend and the shims of `compat/cpu_backend.py` are used.
    """
    device = default_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        from megatron_ral.compat import cpu_backend

        cpu_backend.install()
    if not dist.is_initialized():
        for name, value in (
            ("RANK", "0"),
            ("WORLD_SIZE", "1"),
            ("LOCAL_RANK", "0"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", "0" if "RANK" not in os.environ else "29500"),
        ):
            os.environ.setdefault(name, value)
        if os.environ["MASTER_PORT"] == "0":
            os.environ["MASTER_PORT"] = str(_free_port())
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=timeout_minutes))
    torch.manual_seed(seed)
    return _build(tensor_size, pipeline_size, device, timeout_minutes)


def another_layout(
    process_groups: ProcessGroups, *, tensor_size: int, pipeline_size: int, timeout_minutes: int = 30
) -> ProcessGroups:
    """Groups of a second layout over the same ranks; `groups` itself where it is the same. The first stays in use."""
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
    embedding = None
    if pipeline_size > 1 and (layout.is_first_stage or layout.is_last_stage):
        embedding = parallel_state.get_embedding_group()
    return ProcessGroups(
        layout=layout,
        device=device,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
        embedding=embedding,
        globals=layout_globals(),
    )


def stop_groups() -> None:
    """Leave the job (also between two layouts in one process, as tests do)."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def simulate_rank(rank: int, world_size: int, *, tensor_size: int, pipeline_size: int) -> Iterator[ProcessGroups]:
    """The groups of one rank of a job that is not there: collectives return at once and move nothing. For rehearsals, in a
    process without an accelerator that has joined no job."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_ral.compat import cpu_backend

    assert not dist.is_initialized(), "a rank can be played only where no job was joined"
    cpu_backend.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield _build(tensor_size, pipeline_size, torch.device("cpu"), 30)
    finally:
        stop_groups()


def _free_port() -> int:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
