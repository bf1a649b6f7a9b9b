"""What a run and the replay of one of its batches build alike: the loss, and the teacher."""

import logging
from typing import Optional

from megatron_ral.config import RunConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.teacher import TeacherEngine
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.process_groups import ProcessGroups, another_layout
from megatron_ral.objectives.distillation import DistillTerm
from megatron_ral.objectives.objective import RalObjective

logger = logging.getLogger(__name__)


def build_teacher(
    config: RunConfig,
    teacher_shape: ModelShape,
    shape: ModelShape,
    process_groups: ProcessGroups,
    processor: PromptProcessor,
) -> TeacherEngine:
    """The teacher, in its own layout over the same ranks."""
    settings = config.teacher
    offload = settings.cpu_offload and process_groups.device.type != "cpu"
    if settings.cpu_offload and not offload and process_groups.layout.rank == 0:
        logger.warning("teacher.cpu_offload has no effect without an accelerator: the host's memory is all there is")
    tensor_size, pipeline_size = config.teacher_layout
    own = another_layout(
        process_groups,
        tensor_size=tensor_size,
        pipeline_size=pipeline_size,
        timeout_minutes=config.parallel.timeout_minutes,
    )
    return TeacherEngine(
        teacher_shape,
        own,
        settings.dtype,
        settings.path,
        student=process_groups,
        student_shape=shape,
        processor=processor,
        sequence_parallel=settings.sequence_parallel,
        cpu_offload=offload,
    )


def build_objective(
    config: RunConfig, shape: ModelShape, process_groups: ProcessGroups, teacher: Optional[TeacherEngine]
) -> RalObjective:
    """The loss of RL, with what a teacher adds."""
    distill = None
    if teacher is not None:
        settings = config.distill
        layers = shape.layer_indices(settings.attention_layers, "distill.attention_layers")
        unnamed = range(shape.num_layers) if settings.attention_coef > 0 else [shape.num_layers - 1]
        distill = DistillTerm(settings, frozenset(layers or unnamed), process_groups.tensor, teacher.head)
    return RalObjective(
        config.loss,
        frozenset(shape.layer_indices(config.loss.attention_layers)),
        config.loss.attention_coef,
        config.rollout.temperature,
        distill=distill,
    )
