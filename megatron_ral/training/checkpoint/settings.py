"""Settings of checkpoints, and the comparison of a run's settings with those a checkpoint was made with."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping

from megatron_ral.config import RunConfig, dump_config, flat_settings, load_config
from megatron_ral.errors import CheckpointError, ConfigError, show_value
from megatron_ral.training.checkpoint.files import CONFIG
from megatron_ral.training.checkpoint.inputs import (
    MODELS,
    SOURCES,
    difference,
    input_files,
    path_of,
    saved_inputs,
    with_places,
)

FREE_SETTINGS = (
    "logging.",
    "parallel.",
    "watchdog.",
    "train.stop_after_step",
    "train.checkpoint_interval",
    "train.keep_checkpoints",
    "train.async_checkpoint",
    "train.output_dir",
    "train.export",
    "train.max_skipped_steps",
    "train.time_limit_minutes",
    "train.keep_replays",
    "train.micro_batch_size",
    "train.tokens_per_micro_batch",
    "rollout.generation_batch_size",
    "rollout.cache_tokens",
    "loss.attention_store",
    "teacher.tensor_model_parallel_size",
    "teacher.pipeline_model_parallel_size",
    "teacher.sequence_parallel",
    "teacher.cpu_offload",
    "data.decode_workers",
    "data.decode_ahead",
    "data.eval_shards",
)
"""Prefixes of the settings that a resumed run may change, because none of them changes the mathematics."""


@dataclass(frozen=True)
class CheckpointSettings:
    """Where, how and with which settings a run writes its checkpoints."""

    output_dir: str
    """Folder of the run."""
    num_to_keep: int
    """Number of most recent checkpoints to keep."""
    in_thread: bool
    """True if saves are written by a thread while training goes on."""
    train_vision: bool
    """True if the vision tower is trained, so that it has state."""
    config_text: str = field(repr=False)
    """Configuration of the run as YAML, saved with every checkpoint."""
    values: Mapping[str, Any] = field(repr=False)
    """Every setting of the run by dotted key."""

    @classmethod
    def from_config(cls, config: RunConfig) -> "CheckpointSettings":
        """Return the settings of a run's configuration."""
        return cls(
            output_dir=config.train.output_dir,
            num_to_keep=config.train.keep_checkpoints,
            in_thread=config.train.async_checkpoint,
            train_vision=config.model.train_vision,
            config_text=dump_config(config),
            values=flat_settings(config),
        )


def read_saved_config(checkpoint: Path) -> RunConfig:
    """Return the configuration that a checkpoint was made with, also one of an earlier version.

    A setting that the earlier version did not have gets its default.

    Args:
        checkpoint: Folder of a whole checkpoint.

    Raises:
        CheckpointError: The file is unreadable, or has a setting or value that this version does not know.
    """
    try:
        return load_config(checkpoint / CONFIG)
    except ConfigError as error:
        raise CheckpointError(
            f"'{checkpoint}'",
            None,
            f"was made with settings that this version cannot use ({error}); resume it with the version that wrote it, "
            "or start in another train.output_dir",
        ) from None


def check_settings(settings: CheckpointSettings, checkpoint: Path) -> None:
    """Compare the settings of a run, and the files that it reads, with those of the checkpoint it is to resume from.

    A model folder or shards may have moved: their names and sizes are compared instead of their paths.

    Raises:
        CheckpointError: A file has changed, or a setting outside `FREE_SETTINGS` differs.
    """
    # An empty mapping is left out, so that an entry of a mapping that only one side has is named by its own key.
    now, saved = (
        {key: value for key, value in values.items() if value != {}}
        for values in (settings.values, flat_settings(read_saved_config(checkpoint)))
    )
    listed = saved_inputs(checkpoint)
    for key, files in input_files(now).items():
        if key in listed and (problem := difference(files, listed[key])):
            raise CheckpointError(
                key,
                path_of(now, key),
                f": {problem}, unlike when checkpoint '{checkpoint}' was made; give the same files, or start in "
                "another train.output_dir",
            )
    way_out = "resume with the same setting"
    if not listed:
        way_out += " (it is of a version that listed no files; where they moved, put a link at the old path)"
    saved = with_places(saved, now, listed)
    for key in sorted(saved.keys() | now.keys()):
        if saved.get(key) != now.get(key) and not key.startswith(FREE_SETTINGS):
            raise CheckpointError(
                key,
                now.get(key, "nothing"),
                f"but checkpoint '{checkpoint}' was made with {show_value(saved.get(key, 'nothing'))}; "
                f"{way_out if key in (*MODELS, SOURCES) else 'resume with the same setting'}, or start in another "
                "train.output_dir",
            )
