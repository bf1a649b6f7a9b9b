"""Check that a teacher fits beside the policy, before any weight is read.

Only bytes that are certain are counted, on the rank that holds most of them: shards of every model between uses,
float32 gradients, master weights and moments of trained parameters, and the largest stage that is ever gathered.
Activations, KV cache, logits and attention rows come on top.
"""

import os
from dataclasses import dataclass

import psutil
import torch

from megatron_ral.errors import ConfigError
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.planning.launch_plan import LaunchPlan, TeacherPlan
from megatron_ral.planning.parameters import stage_parameters
from megatron_ral.weights.resharding import held_parameters

BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes of one number by the name of its precision."""
GIB = 2**30
"""Bytes of one GiB."""


@dataclass(frozen=True)
class HeldBytes:
    """Bytes of one model on the rank that holds most of it."""

    shard: int
    """Bytes held between uses."""
    gathered: int
    """Additional bytes while a whole stage is used; 0 where the shard is the whole stage."""


def frozen_bytes(shape: ModelShape, layout: RankLayout, dtype: str, moved: bool = False) -> HeldBytes:
    """Return the bytes of a frozen model.

    Args:
        shape: model.
        layout: layout of the model's ranks.
        dtype: precision of its parameters.
        moved: whether its shards wait in another memory than the one it is used in (offload).
    """
    stages = stage_parameters(shape, layout)
    stage = max(stage.per_tensor_rank for stage in stages) * BYTES[dtype]
    return HeldBytes(
        max(stage.per_rank for stage in stages) * BYTES[dtype], stage if layout.data_size > 1 or moved else 0
    )


def policy_bytes(shape: ModelShape, layout: RankLayout, dtype: str, train_vision: bool) -> HeldBytes:
    """Return the bytes of the policy: parameters, and float32 gradient, master weight and two moments of trained ones.

    Args:
        shape: model.
        layout: layout of the policy's ranks.
        dtype: precision of its parameters.
        train_vision: whether the vision tower is trained.
    """
    held = frozen_bytes(shape, layout, dtype)
    trained = max(
        sum(-(-part.numel // layout.data_size) for name, part in stage.items() if shape.is_trained(name, train_vision))
        for stage in held_parameters(shape, layout.tensor_size, layout.pipeline_size)
    )
    return HeldBytes(held.shard + 16 * trained, held.gathered)


def teacher_bytes(plan: TeacherPlan, teacher: ModelShape, world_size: int, moved: bool) -> HeldBytes:
    """Return the bytes of a teacher on `world_size` ranks. Arguments: see `frozen_bytes`."""
    return frozen_bytes(teacher, RankLayout(0, world_size, plan.tensor_size, plan.pipeline_size), plan.dtype, moved)


def head_bytes(plan: TeacherPlan, teacher: ModelShape, shape: ModelShape, tensor_size: int) -> int:
    """Return the bytes of the copy of a teacher's LM head that a rank of the policy holds."""
    return shape.padded_vocab_size(tensor_size) // tensor_size * teacher.hidden_size * BYTES[plan.dtype]


def device_memory() -> int:
    """Return the free bytes of one process: of its GPU, or its share of the host's memory where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[0]
    return host_memory()


def host_memory() -> int:
    """Return this process's share of the host's free memory in bytes."""
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_fits(plan: LaunchPlan, shape: ModelShape, teacher: ModelShape) -> None:
    """Check that a teacher can be held beside the policy and a reference.

    Args:
        plan: plan of the launch, with a teacher.
        shape: the policy's model.
        teacher: the teacher's model.

    Raises:
        ConfigError: the teacher does not fit. It names the bytes needed, the bytes free and the way out.
    """
    settings, layout = plan.teacher, plan.layout
    if settings is None:
        return
    offload = settings.cpu_offload and torch.cuda.is_available()
    held = teacher_bytes(settings, teacher, layout.world_size, offload)
    others = [policy_bytes(shape, layout, plan.dtype, plan.train_vision)]
    if plan.holds_reference:
        others.append(frozen_bytes(shape, layout, plan.dtype))
    needed = {
        "this device": (
            sum(other.shard for other in others)
            + head_bytes(settings, teacher, shape, layout.tensor_size)
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
                "teacher.path",
                teacher.path,
                f"does not fit: with tensor {settings.tensor_size} x pipeline {settings.pipeline_size} on "
                f"{layout.world_size} ranks it takes {held.shard / GIB:.1f} GiB of each between uses and "
                f"{held.gathered / GIB:.1f} GiB more while it reads; beside "
                f"{sum(other.shard for other in others) / GIB:.1f} GiB of policy and reference that is "
                f"{total / GIB:.1f} GiB of {where}, of which {free / GIB:.1f} GiB are free; take "
                f"{'' if settings.cpu_offload else 'teacher.cpu_offload = true (with GPUs), '}more ranks, or larger "
                "teacher.tensor_model_parallel_size and teacher.pipeline_model_parallel_size",
            )
