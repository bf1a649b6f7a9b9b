"""Builders of the parts that a run and the replay of one of its batches share: models, objective, teacher."""

import logging
from dataclasses import replace
from typing import Optional

from megatron_ral.config.sections import RunConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.policy import PolicyEngine
from megatron_ral.engine.settings import EngineSettings, TrainingSettings
from megatron_ral.engine.teacher import TeacherEngine
from megatron_ral.models.shape import ModelShape
from megatron_ral.objectives.attention import AttentionTerm
from megatron_ral.objectives.base import Objective, Term
from megatron_ral.objectives.distillation import AttentionDistillationTerm, TokenDistillationTerm
from megatron_ral.objectives.policy_gradient import PolicyGradientTerm
from megatron_ral.parallel.process_groups import ProcessGroups, another_layout
from megatron_ral.rollout.native_sampler import NativeSampler
from megatron_ral.rollout.sampler import Sampler
from megatron_ral.rollout.served.sampler import ServedSampler
from megatron_ral.rollout.served.settings import ServedSettings

logger = logging.getLogger(__name__)


def build_policy(
    config: RunConfig, shape: ModelShape, process_groups: ProcessGroups, require_finite: bool = True
) -> PolicyEngine:
    """Return the policy of a run.

    Args:
        config: Configuration of the run.
        shape: Shape of the model.
        process_groups: Process groups.
        require_finite: Refuse weights with NaN or infinite values.
    """
    settings = replace(EngineSettings.from_config(config), require_finite=require_finite)
    return PolicyEngine(shape, process_groups, settings, TrainingSettings.from_config(config))


def build_teacher(
    config: RunConfig,
    teacher_shape: ModelShape,
    shape: ModelShape,
    process_groups: ProcessGroups,
    processor: PromptProcessor,
) -> TeacherEngine:
    """Return the teacher, in its own layout over the same ranks.

    Args:
        config: Configuration of the run.
        teacher_shape: Shape of the teacher.
        shape: Shape of the student.
        process_groups: Process groups of the student.
        processor: Maker of prompts from samples.
    """
    offload = config.teacher.cpu_offload and process_groups.device.type != "cpu"
    if config.teacher.cpu_offload and not offload and process_groups.layout.rank == 0:
        logger.warning("teacher.cpu_offload has no effect without an accelerator, because host memory is all there is")
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
        EngineSettings.teacher_from_config(config, offload),
        student=process_groups,
        student_shape=shape,
        processor=processor,
    )


def build_sampler(config: RunConfig, policy: PolicyEngine, processor: PromptProcessor) -> Sampler:
    """Return the source of the policy's responses."""
    if config.train.algorithm == "ral" and config.rollout.sampler == "vllm":
        return ServedSampler(policy, processor, ServedSettings.from_config(config))
    return NativeSampler(policy)


def build_objective(
    config: RunConfig, shape: ModelShape, process_groups: ProcessGroups, teacher: Optional[TeacherEngine] = None
) -> Objective:
    """Return the objective of RL: token losses and the attention term, and with a teacher what it adds."""
    loss, distill = config.loss, config.distill
    attention = AttentionTerm(loss, frozenset(shape.layer_indices(loss.attention_layers)), loss.attention_coef)
    terms: list[Term] = [PolicyGradientTerm(loss), attention]
    if teacher is not None:
        layers = shape.layer_indices(distill.attention_layers, "distill.attention_layers")
        default = shape.softmax_layers if distill.attention_coef > 0 else shape.softmax_layers[-1:]
        terms += [
            TokenDistillationTerm(distill, process_groups.tensor, teacher.head),
            AttentionDistillationTerm(distill, frozenset(layers or default)),
        ]
    return Objective(tuple(terms), attention.position, config.rollout.temperature)
