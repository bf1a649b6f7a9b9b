"""Checkpoints: everything a run needs to go on, written so that a half-written one is never taken for whole.

    <output_dir>/checkpoints/step_00000020/     rank_00000.safetensors ...  rank_00000.json ...  config.yaml
                                                manifest.json (written last, then the folder gets its name)
    <output_dir>/checkpoints/latest             link to the newest

Every rank writes its own ZeRO-3 shards (master weights, AdamW moments and the average of target `ema` by parameter name)
as safetensors, and its position in the data as JSON. In the layout it was saved in a run goes on bit for bit; in another
one every rank reads the parts that are its own now (`weights/resharding.py`). Writing is `training/checkpoint/writer.py`.
"""

from pathlib import Path
from typing import Optional

from megatron_ral.config import RunConfig, flat_settings, load_config
from megatron_ral.data.loader import PromptLoader
from megatron_ral.errors import CheckpointError
from megatron_ral.models.folder import read_json
from megatron_ral.parallel.collectives import gather_from_all, raise_together
from megatron_ral.runtime.random_state import set_random_state
from megatron_ral.training.checkpoint.files import (
    CONFIG,
    checkpoint_root,
    newest_checkpoint,
    position_file,
    read_manifest,
    state_file,
    whole_checkpoints,
)
from megatron_ral.training.step import Engines
from megatron_ral.weights.resharding import OwnShards, ReshardedState

# Settings that may differ between a checkpoint and the run that goes on from it: none of them changes the mathematics.
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
    "rollout.generation_batch_size",
    "loss.attention_store",
    "teacher.tensor_model_parallel_size",
    "teacher.pipeline_model_parallel_size",
    "teacher.sequence_parallel",
    "teacher.cpu_offload",
    "data.decode_workers",
    "data.decode_ahead",
    "data.eval_shards",
)


def find_checkpoint(config: RunConfig, resume: bool, warn: bool = False) -> Optional[Path]:
    """What to resume from; None where a run starts anew.

    Args:
        resume: go on from the newest whole checkpoint.
        warn: name the folders that are passed over.

    Raises:
        CheckpointError: not resuming into a folder that holds checkpoints (they would be mixed with the new ones), or
            resuming with other settings than the checkpoint was made with, or from another version of the format.
    """
    found = newest_checkpoint(config.train.output_dir, warn)
    if found is None:
        return None
    if not resume:
        raise CheckpointError(
            f"train.output_dir = '{config.train.output_dir}' holds '{found.name}' of an earlier run; "
            "give --resume to go on from it, or another train.output_dir"
        )
    _check_settings(config, found)
    return found


def _check_settings(config: RunConfig, found: Path) -> None:
    # Through the loader, so that a setting which the checkpoint's version did not have counts with its default.
    saved, now = (
        {key: value for key, value in flat_settings(made).items() if value != {}}
        for made in (load_config(found / CONFIG), config)
    )
    for key in sorted(saved.keys() | now.keys()):
        if saved.get(key) != now.get(key) and not key.startswith(FREE_SETTINGS):
            raise CheckpointError(
                f"{key} = {now.get(key)} but checkpoint '{found}' was made with {saved.get(key)}; "
                "resume with the same setting, or start in another train.output_dir"
            )


def agree_on_checkpoint(config: RunConfig, found: Optional[Path]) -> Optional[Path]:
    """The checkpoint that every rank takes: the newest that all of them see whole; every rank calls it.

    Args:
        found: what `find_checkpoint` gave this rank.

    Raises:
        AgreedError: some rank sees none of those that others see.
    """
    names = gather_from_all(found.name if found is not None else None)
    if len(set(names)) == 1:
        return found
    seen = [set(each) for each in gather_from_all([path.name for path in whole_checkpoints(config.train.output_dir)])]
    common, problem = max(set.intersection(*seen), default=None), None
    if common is None:
        rank = next(rank for rank, each in enumerate(seen) if each != set.union(*seen))
        problem = CheckpointError(
            f"no checkpoint in train.output_dir = '{config.train.output_dir}' is seen whole by every "
            f"rank: rank {rank} sees {sorted(seen[rank]) or 'none'} of "
            f"{sorted(set.union(*seen))}; it must lie on a file system that all nodes share"
        )
    else:
        try:
            _check_settings(config, checkpoint_root(config.train.output_dir) / common)
        except ValueError as error:
            problem = error
    raise_together(problem)
    return checkpoint_root(config.train.output_dir) / common


def restore_checkpoint(path: Path, engines: Engines, loader: PromptLoader) -> int:
    """Continue from a checkpoint of any layout; returns the number of steps done. Every rank calls it.

    Raises:
        AgreedError: a rank could not read what it needs, or the checkpoint is of another model.
    """
    problem, step = None, 0
    try:
        step = _restore(path, engines, loader)
    except (OSError, ValueError) as error:
        problem = error
    raise_together(problem)
    return step


def _restore(path: Path, engines: Engines, loader: PromptLoader) -> int:
    policy, manifest = engines.policy, read_manifest(path)
    manifest.check_model(path, policy.shape, policy.config.model.train_vision)
    layout, old = policy.layout, manifest.layout
    same = old.with_rank(layout.rank) == layout
    position = read_json(path / position_file(layout.rank if same else 0), "loader", "num_steps_taken", "random")
    state = (
        OwnShards(path / state_file(layout.rank))
        if same
        else ReshardedState(policy.shape, old, layout, lambda rank: path / state_file(rank))
    )
    policy.load_state(state, position["num_steps_taken"])
    if engines.average is not None:
        engines.average.load_state(state)
    state.close()
    loader.restore(position["loader"])
    if same:
        set_random_state(position["random"])
    return manifest.step
