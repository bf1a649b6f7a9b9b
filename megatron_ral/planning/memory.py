"""Whether models that are held beside each other fit, before any of them is read.

Counted is what is there for certain: parameters, gradients and optimizer state of the policy, shards of frozen models, and
the largest stage that is ever gathered. Activations, KV cache and logits come on top.
"""

import os
from dataclasses import dataclass

import psutil
import torch

from megatron_ral.config import ConfigError, RunConfig
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.layout import ParallelLayout
from megatron_ral.planning.parameters import stage_parameters

BYTES = {"float32": 4, "bfloat16": 2}
GIB = 2**30


@dataclass(frozen=True)
class FrozenBytes:
    """One frozen model on the rank that holds most of it."""

    shard: int
    """Between uses."""
    gathered: int
    """A whole stage, while it is used."""

    @property
    def total(self) -> int:
        return self.shard + self.gathered


def frozen_bytes(shape: ModelShape, tensor_size: int, pipeline_size: int, world_size: int, dtype: str,
                 cpu_offload: bool = False) -> FrozenBytes:
    """Bytes on the device of a frozen model in a layout; with `cpu_offload` its shards are in the host's memory."""
    stages = stage_parameters(shape, ParallelLayout(0, world_size, tensor_size, pipeline_size))
    return FrozenBytes(0 if cpu_offload else max(stage.per_rank for stage in stages) * BYTES[dtype],
                       max(stage.per_tensor_rank for stage in stages) * BYTES[dtype])


def policy_bytes(config: RunConfig, shape: ModelShape, world_size: int) -> int:
    """Bytes of the policy's shards between steps: parameters, float32 gradient, master weights and two moments."""
    stages = stage_parameters(shape, ParallelLayout(0, world_size, config.parallel.tensor_model_parallel_size,
                                                    config.parallel.pipeline_model_parallel_size))
    return max(stage.per_rank for stage in stages) * (BYTES[config.model.dtype] + 16)


def device_memory() -> int:
    """Free bytes for one process: of its GPU, or its share of the host's memory where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_fits(config: RunConfig, shape: ModelShape, teacher: ModelShape) -> None:
    """Refuse a teacher that cannot be held beside the policy.

    Raises:
        ConfigError: naming what is needed, what there is, and what would make it fit.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    tensor, pipeline = config.teacher_layout
    held = frozen_bytes(teacher, tensor, pipeline, world_size, config.teacher.dtype, config.teacher.cpu_offload)
    policy, there = policy_bytes(config, shape, world_size), device_memory()
    if held.total + policy <= there:
        return
    offload = "" if config.teacher.cpu_offload else "teacher.cpu_offload = true, "
    raise ConfigError(
        f"teacher.path = '{teacher.path}' does not fit: with tensor {tensor} x pipeline {pipeline} on {world_size} ranks it "
        f"takes {held.shard / GIB:.1f} GiB of each between uses and {held.gathered / GIB:.1f} GiB more while it reads, beside "
        f"{policy / GIB:.1f} GiB of the policy, and {there / GIB:.1f} GiB are free; take {offload}more ranks, or larger "
        "teacher.tensor_model_parallel_size and teacher.pipeline_model_parallel_size")
