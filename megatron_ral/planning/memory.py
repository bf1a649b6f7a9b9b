"""Whether a teacher fits beside the policy, before anything of them is read.

Counted is what is there for certain on the rank that holds most: shards of every model between uses, float32 gradients,
master weights and moments of what is trained, and the largest stage that is ever gathered. Activations, KV cache, logits
and attention rows come on top.
"""

import os
from dataclasses import dataclass

import psutil
import torch

from megatron_ral.config import RunConfig
from megatron_ral.errors import ConfigError
from megatron_ral.models.parameter_shapes import visual_shapes
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.planning.parameters import stage_parameters

BYTES = {"float32": 4, "bfloat16": 2}
GIB = 2**30


@dataclass(frozen=True)
class HeldBytes:
    """Bytes of one model on the rank that holds most of it."""

    shard: int
    """Between uses."""
    gathered: int
    """What comes to it while a whole stage is used; 0 where the shard is the stage already."""


def frozen_bytes(
    shape: ModelShape, tensor_size: int, pipeline_size: int, world_size: int, dtype: str, moved: bool = False
) -> HeldBytes:
    """A frozen model in a layout.

    Args:
        moved: its shards wait in another memory than the one it is used in (offload).
    """
    layout = RankLayout(0, world_size, tensor_size, pipeline_size)
    stages = stage_parameters(shape, layout)
    stage = max(stage.per_tensor_rank for stage in stages) * BYTES[dtype]
    return HeldBytes(
        max(stage.per_rank for stage in stages) * BYTES[dtype], stage if layout.data_size > 1 or moved else 0
    )


def policy_bytes(config: RunConfig, shape: ModelShape, world_size: int) -> HeldBytes:
    """The policy: parameters, and float32 gradient, master weights and two moments of those that are trained."""
    layout = RankLayout(
        0, world_size, config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    )
    held = frozen_bytes(shape, layout.tensor_size, layout.pipeline_size, world_size, config.model.dtype)
    visual = 0 if config.model.train_vision else sum(torch.Size(size).numel() for size in visual_shapes(shape).values())
    trained = max(
        stage.per_rank - (visual // layout.data_size if stage.stage == 0 else 0)
        for stage in stage_parameters(shape, layout)
    )
    return HeldBytes(held.shard + 16 * trained, held.gathered)


def device_memory() -> int:
    """Free bytes for one process: of its GPU, or its share of the host's memory where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[0]
    return host_memory()


def host_memory() -> int:
    """This process's share of the host's free memory."""
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_fits(config: RunConfig, shape: ModelShape, teacher: ModelShape) -> None:
    """Refuse a teacher that cannot be held beside the policy and a reference.

    Raises:
        ConfigError: naming what is needed, what there is, and what would make it fit.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    tensor, pipeline = config.teacher_layout
    offload = config.teacher.cpu_offload and torch.cuda.is_available()
    held = frozen_bytes(teacher, tensor, pipeline, world_size, config.teacher.dtype, offload)
    policy = policy_bytes(config, shape, world_size)
    others = [policy]
    if config.needs_reference:
        others.append(
            frozen_bytes(
                shape,
                config.parallel.tensor_model_parallel_size,
                config.parallel.pipeline_model_parallel_size,
                world_size,
                config.model.dtype,
            )
        )
    head = (
        shape.padded_vocab_size(config.parallel.tensor_model_parallel_size)
        // config.parallel.tensor_model_parallel_size
        * teacher.hidden_size
        * BYTES[config.teacher.dtype]
    )
    needed = {
        "this device": (
            sum(other.shard for other in others)
            + head
            + (0 if offload else held.shard)
            + max(model.gathered for model in (held, *others)),
            device_memory(),
        )
    }
    if offload:
        needed["this process's share of the host's memory"] = (held.shard, host_memory())
    for where, (total, free) in needed.items():
        if total > free:
            raise ConfigError(
                f"teacher.path = '{teacher.path}' does not fit: with tensor {tensor} x pipeline {pipeline} on {world_size} "
                f"ranks it takes {held.shard / GIB:.1f} GiB of each between uses and {held.gathered / GIB:.1f} GiB more while "
                f"it reads; beside {sum(other.shard for other in others) / GIB:.1f} GiB of policy and reference that is "
                f"{total / GIB:.1f} GiB of {where}, of which {free / GIB:.1f} GiB are free; take "
                f"{'' if config.teacher.cpu_offload else 'teacher.cpu_offload = true (with GPUs), '}more ranks, or larger "
                "teacher.tensor_model_parallel_size and teacher.pipeline_model_parallel_size"
            )
