"""Settings of an engine: where its weights come from, how they are held, and how they are trained."""

import math
from dataclasses import dataclass, replace
from typing import Callable

import torch

from megatron_ral.config.loss import OptimizerConfig
from megatron_ral.config.sections import RunConfig
from megatron_ral.models.adapters import AdapterShape
from megatron_ral.models.shape import ModelShape, read_shape


def shape_from_config(config: RunConfig, key: str = "model.path", path: str = "") -> ModelShape:
    """Return the shape of a run's policy, with its adapters.

    Args:
        config: Configuration of the run.
        key: Setting or option that names the folder, for the error.
        path: Folder of the model; empty for model.path.

    Raises:
        ConfigError, CheckpointError: As `read_shape`.
    """
    return replace(read_shape(path or config.model.path, key), adapter=AdapterShape.from_config(config.adapter))


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class EngineSettings:
    """Settings of the stage of one model, frozen or trained."""

    path: str
    """Hugging Face or Megatron folder with the weights."""
    dtype: str
    """Precision of parameters and activations, `float32` or `bfloat16`."""
    sequence_parallel: bool = False
    """Cut the sequence over tensor-parallel ranks outside attention."""
    offload_parameters: bool = False
    """Keep the shards of parameters in host memory between uses."""
    gather: str = "stage"
    """Unit that is gathered from the data-parallel ranks in a training pass: `stage` or `layer`."""
    overlap: bool = False
    """Gather and reduce while passes compute."""
    require_finite: bool = True
    """Refuse weights with NaN or infinite values. A replay takes them: they may be what it looks for."""
    adapter_path: str = ""
    """PEFT folder that adapters start from; empty for new ones."""
    adapter_seed: int = 0
    """Seed of new adapters."""

    @classmethod
    def from_config(cls, config: RunConfig) -> "EngineSettings":
        """Return the settings of the policy."""
        settings = cls._from_config(config, config.model.path)
        return replace(settings, adapter_path=config.adapter.path, adapter_seed=config.seed)

    @classmethod
    def reference_from_config(cls, config: RunConfig) -> "EngineSettings":
        """Return the settings of the frozen reference."""
        return cls._from_config(config, config.model.reference_path or config.model.path)

    @classmethod
    def teacher_from_config(cls, config: RunConfig, offload: bool) -> "EngineSettings":
        """Return the settings of the frozen teacher.

        Args:
            offload: Keep its shards in host memory between uses.
        """
        teacher = config.teacher
        return cls(teacher.path, teacher.dtype, teacher.sequence_parallel, offload)

    @classmethod
    def _from_config(cls, config: RunConfig, path: str) -> "EngineSettings":
        parallel = config.parallel
        return cls(
            path,
            config.model.dtype,
            parallel.sequence_parallel,
            parallel.offload_parameters,
            parallel.gather,
            parallel.overlap_communication,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of the trained stage of a policy."""

    optimizer: OptimizerConfig
    num_optimizer_steps: int
    """Optimizer steps of the whole run, over which the learning rate is scheduled."""
    train_vision: bool = False
    """Train the vision tower and its projector."""
    offload_optimizer: bool = False
    """Keep master weights, gradients and moments in host memory."""
    recompute: bool = False
    """Compute activations of layers that are not recorded again in the backward pass."""

    @classmethod
    def from_config(cls, config: RunConfig) -> "TrainingSettings":
        return cls(
            config.optimizer,
            config.num_optimizer_steps,
            config.model.train_vision,
            config.parallel.offload_optimizer,
            config.parallel.recompute_activations,
        )

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of 0-based optimizer step `step`."""
        settings = self.optimizer
        return settings.learning_rate * schedule_factor(
            step, self.num_optimizer_steps, settings.warmup_steps, settings.decay, settings.min_learning_rate_ratio
        )

    def make_optimizer(self, device: torch.device) -> Callable[[list], torch.optim.Optimizer]:
        """Return a function from the trained parameters to AdamW."""
        settings = self.optimizer

        def make(parameters: list) -> torch.optim.Optimizer:
            return torch.optim.AdamW(
                parameters,
                lr=settings.learning_rate,
                betas=(settings.beta1, settings.beta2),
                eps=settings.eps,
                weight_decay=settings.weight_decay,
                fused=device.type == "cuda",
            )

        return make


def schedule_factor(step: int, total: int, warmup: int, decay: str, low: float = 0.0) -> float:
    """Return the factor of a scheduled setting: linear warm-up, then constant, linear or cosine decay to `low`.

    Args:
        step: 0-based optimizer step.
        total: Optimizer steps of the run.
        warmup: Steps of the warm-up.
        decay: `constant`, `linear` or `cosine`.
        low: Factor at the end of a decay.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    remaining = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[decay]
    return remaining if decay == "constant" else low + (1.0 - low) * remaining
