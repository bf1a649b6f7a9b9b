"""What a run writes, before it writes it."""

from pathlib import Path
from typing import Optional

import torch

from megatron_ral.config import RunConfig
from megatron_ral.errors import ConfigError
from megatron_ral.models.parameter_shapes import expected_shapes, visual_shapes
from megatron_ral.models.shape import ModelShape
from megatron_ral.planning.memory import BYTES, GIB


def checkpoint_bytes(config: RunConfig, shape: ModelShape) -> int:
    """One checkpoint: float32 weights and two moments of what is trained, and the average of past policies with `ema`."""
    total = sum(torch.Size(size).numel() for size in expected_shapes(shape).values())
    if not config.model.train_vision:
        total -= sum(torch.Size(size).numel() for size in visual_shapes(shape).values())
    average = config.train.algorithm == "ral" and config.loss.attention_target == "ema"
    return total * (16 if average else 12)


def needed_bytes(config: RunConfig, shape: ModelShape) -> int:
    """The checkpoints that are there at once while one more is written, and the export."""
    saves = -(-config.train.num_steps // config.train.checkpoint_interval) if config.train.checkpoint_interval else 1
    weights = sum(torch.Size(size).numel() for size in expected_shapes(shape).values()) * BYTES[config.model.dtype]
    return (
        checkpoint_bytes(config, shape) * min(saves, config.train.keep_checkpoints + 1) + weights * config.train.export
    )


def disk_problem(config: RunConfig, shape: ModelShape, free: int) -> Optional[ConfigError]:
    """What is wrong where `free` bytes, and those that older checkpoints of this run hold, are too few; or None."""
    held = sum(path.stat().st_size for path in Path(config.train.output_dir).glob("checkpoints/*/*") if path.is_file())
    needed = needed_bytes(config, shape)
    if needed <= free + held:
        return None
    return ConfigError(
        f"train.output_dir = '{config.train.output_dir}' has {free / GIB:.1f} GiB free, but the run writes up to "
        f"{needed / GIB:.1f} GiB ({checkpoint_bytes(config, shape) / GIB:.1f} GiB per checkpoint, train.keep_checkpoints = "
        f"{config.train.keep_checkpoints} and one that is being written, and the export); take a larger disk, or a smaller "
        "train.keep_checkpoints"
    )
