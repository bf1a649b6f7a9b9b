"""Bytes that a run writes to disk, known before it starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch

from megatron_ral.config import RunConfig
from megatron_ral.errors import ConfigError
from megatron_ral.models.parameter_shapes import adapter_shapes, expected_shapes, visual_shapes
from megatron_ral.models.shape import ModelShape
from megatron_ral.planning.memory import BYTES, GIB


@dataclass(frozen=True)
class DiskPlan:
    """Settings that decide how much a run writes."""

    output_dir: str
    """Output folder of the run."""
    num_steps: int
    """Steps of the run."""
    checkpoint_interval: int
    """Steps between checkpoints; 0 for one at the end."""
    keep_checkpoints: int
    """Number of most recent checkpoints on disk."""
    export: bool
    """True if the final weights are written as a Hugging Face folder."""
    dtype: str
    """Precision of the exported weights."""
    train_vision: bool
    """True if the vision tower is part of a checkpoint, because it is trained."""

    @classmethod
    def from_config(cls, config: RunConfig) -> "DiskPlan":
        """Return the settings of a run."""
        train, model = config.train, config.model
        return cls(
            train.output_dir,
            train.num_steps,
            train.checkpoint_interval,
            train.keep_checkpoints,
            train.export,
            model.dtype,
            model.train_vision,
        )


def _numel(shapes: dict) -> int:
    return sum(torch.Size(size).numel() for size in shapes.values())


def checkpoint_bytes(plan: DiskPlan, shape: ModelShape) -> int:
    """Return the bytes of one checkpoint: float32 weights and two moments of every trained parameter."""
    if shape.adapter is not None:
        return 12 * _numel(adapter_shapes(shape))
    return 12 * (_numel(expected_shapes(shape)) - (0 if plan.train_vision else _numel(visual_shapes(shape))))


def needed_bytes(plan: DiskPlan, shape: ModelShape) -> int:
    """Return the bytes of the export and of all checkpoints that exist while one more is written."""
    saves = -(-plan.num_steps // plan.checkpoint_interval) if plan.checkpoint_interval else 1
    weights = _numel(expected_shapes(shape)) * BYTES[plan.dtype]
    return checkpoint_bytes(plan, shape) * min(saves, plan.keep_checkpoints + 1) + weights * plan.export


def disk_problem(plan: DiskPlan, shape: ModelShape, free: int) -> Optional[ConfigError]:
    """Return the error of a disk that is too small for the run, or None.

    Args:
        plan: settings of the run.
        shape: model that is trained.
        free: free bytes of the disk. The bytes of older checkpoints of this run count as free too.
    """
    held = sum(path.stat().st_size for path in Path(plan.output_dir).glob("checkpoints/*/*") if path.is_file())
    needed = needed_bytes(plan, shape)
    if needed <= free + held:
        return None
    return ConfigError(
        "train.output_dir",
        plan.output_dir,
        f"has {free / GIB:.1f} GiB free, but the run writes up to {needed / GIB:.1f} GiB "
        f"({checkpoint_bytes(plan, shape) / GIB:.1f} GiB per checkpoint, train.keep_checkpoints = "
        f"{plan.keep_checkpoints} and one that is being written, and the export); take a larger disk, or a smaller "
        "train.keep_checkpoints",
    )
