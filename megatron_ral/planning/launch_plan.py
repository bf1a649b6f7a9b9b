"""Settings that decide memory, traffic and time of a launch, from a run's configuration and its number of ranks."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Mapping, Optional

from megatron_ral.attention.targets.registry import TARGETS, TargetPass
from megatron_ral.config import RunConfig, check_layout
from megatron_ral.config.load import apply_overrides
from megatron_ral.config.loss import LossConfig
from megatron_ral.config.sections import ParallelConfig
from megatron_ral.engine.settings import EngineSettings, TrainingSettings
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.planning.workload import Workload


@dataclass(frozen=True)
class TeacherPlan:
    """Frozen teacher of a run that distils."""

    path: str
    """Folder of the teacher."""
    dtype: str
    """Precision of its parameters."""
    tensor_size: int
    """Tensor-parallel ranks."""
    pipeline_size: int
    """Pipeline stages."""
    cpu_offload: bool
    """True if its shards wait in the host's memory between uses."""

    @classmethod
    def from_config(cls, config: RunConfig) -> Optional["TeacherPlan"]:
        """Return the teacher of a run, or None for a run without one."""
        if not config.distills:
            return None
        return cls(config.teacher.path, config.teacher.dtype, *config.teacher_layout, config.teacher.cpu_offload)


@dataclass(frozen=True)
class LaunchPlan:
    """Settings of one launch."""

    layout: RankLayout
    """Layout of the policy's ranks, seen from rank 0."""
    work: Workload
    """Sizes of one step on one rank."""
    parallel: ParallelConfig
    """Section `parallel` of the run."""
    engine: EngineSettings
    """Settings of the policy's stage."""
    training: TrainingSettings
    """Settings of its training."""
    loss: LossConfig
    """Section `loss` of the run, which builds the objective."""
    dtype: str
    """Precision of parameters and activations: float32 or bfloat16."""
    train_vision: bool
    """True if the vision tower is trained."""
    is_supervised: bool
    """True if a step is a supervised update instead of a rollout with its updates."""
    passes: Mapping[str, bool]
    """Passes without gradient of one RL step in order, by name, with whether they record attention."""
    needs_reference: bool
    """True if passes of a frozen reference model are made."""
    holds_reference: bool
    """True if its weights are held beside the policy's."""
    temperature: float
    """Sampling temperature."""
    top_p: float
    """Nucleus of sampling."""
    num_epochs: int
    """Passes of training over one rollout."""
    generation_batch_size: int
    """Largest number of prompts that are generated together."""
    ratio_interval: int
    """Steps between measurements of the ratio of gradients, which take one more update; 0 for none."""
    checkpoint_interval: int
    """Steps between checkpoints; 0 for one at the end."""
    teacher: Optional[TeacherPlan]
    """Teacher of the run, or None."""
    visual_tokens: int = -1
    """Visual tokens of each prompt that were asked for; negative for as many as the limits allow."""
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Resolved settings of the run by section, the base of `changed`."""

    @classmethod
    def from_config(cls, config: RunConfig, world_size: int, visual_tokens: int = -1) -> "LaunchPlan":
        """Return the plan of a run on `world_size` ranks.

        Args:
            config: settings of the run.
            world_size: number of ranks.
            visual_tokens: visual tokens of each prompt; negative for as many as the limits allow.

        Raises:
            ConfigError: so many ranks cannot run this configuration.
        """
        check_layout(config, world_size)
        tensor, pipeline = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
        layout = RankLayout(0, world_size, tensor, pipeline)
        work = Workload.from_config(config, layout, visual_tokens)
        is_supervised = config.train.algorithm == "sft"
        passes = {}
        if not is_supervised:
            needs = TARGETS[config.loss.attention_target].needs
            if work.passes > work.on_policy:
                passes["old"] = needs is TargetPass.ROLLOUT_POLICY
            if config.needs_reference:
                passes["reference"] = needs is TargetPass.REFERENCE
        return cls(
            layout=layout,
            work=work,
            parallel=config.parallel,
            engine=EngineSettings.from_config(config),
            training=TrainingSettings.from_config(config),
            loss=config.loss,
            dtype=config.model.dtype,
            train_vision=config.model.train_vision,
            is_supervised=is_supervised,
            passes=passes,
            needs_reference=config.needs_reference,
            holds_reference=config.holds_reference,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            num_epochs=config.rollout.num_epochs,
            generation_batch_size=config.rollout.generation_batch_size,
            ratio_interval=config.logging.gradient_ratio_interval * (not is_supervised and config.attention_acts),
            checkpoint_interval=config.train.checkpoint_interval,
            teacher=TeacherPlan.from_config(config),
            visual_tokens=visual_tokens,
            settings=asdict(config),
        )

    def changed(self, settings: Mapping[str, Any]) -> "LaunchPlan":
        """Return the plan of the same run with other settings, checked like a run of its own.

        Args:
            settings: values by dotted key, e.g. {"train.micro_batch_size": 1}.

        Raises:
            ConfigError: the changed settings are impossible.
        """
        tree = json.loads(json.dumps(self.settings))  # a copy, because the overrides are set in it
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        return LaunchPlan.from_config(apply_overrides(tree, overrides), self.layout.world_size, self.visual_tokens)
