"""Resuming from a checkpoint, in the layout it was written in or another.

    <output_dir>/checkpoints/step_00000020/     rank_00000.safetensors ...  rank_00000.json ...  config.yaml
                                                manifest.json (written last, then the folder gets its name)
    <output_dir>/checkpoints/latest             link to the newest

Every rank writes its own ZeRO-3 shards (master weights and AdamW moments by parameter name) as safetensors, and its
position in the data as JSON. In the same layout a resumed run continues bit for bit. In another layout every rank reads
the ranges that belong to it now (`weights/resharding.py`). Checkpoints are written by `training/checkpoint/writer.py`.
"""

from pathlib import Path
from typing import Optional

from megatron_ral.data.loader import PromptLoader
from megatron_ral.engine.policy import PolicyEngine
from megatron_ral.errors import CheckpointError
from megatron_ral.models.folder import read_json
from megatron_ral.parallel.collectives import gather_from_all, raise_together
from megatron_ral.runtime.random_state import set_random_state
from megatron_ral.training.checkpoint.files import (
    checkpoint_root,
    newest_checkpoint,
    position_file,
    read_manifest,
    state_file,
    whole_checkpoints,
)
from megatron_ral.training.checkpoint.settings import CheckpointSettings, check_settings
from megatron_ral.weights.resharding import OwnShards, ReshardedState


def find_checkpoint(settings: CheckpointSettings, resume: bool, warn: bool = False) -> Optional[Path]:
    """Return the checkpoint to resume from, None where a run starts anew.

    Args:
        settings: Folder and settings of the run.
        resume: Whether to continue from the newest whole checkpoint.
        warn: Whether a warning names the folders that are passed over.

    Raises:
        CheckpointError: The folder holds checkpoints although the run is not to resume (old and new ones would be
            mixed), or the checkpoint was made with other settings or another version of the format.
    """
    found = newest_checkpoint(settings.output_dir, warn)
    if found is None:
        return None
    if not resume:
        raise CheckpointError(
            "train.output_dir",
            settings.output_dir,
            f"holds '{found.name}' of an earlier run; give --resume to continue from it, or another train.output_dir",
        )
    check_settings(settings, found)
    return found


def agree_on_checkpoint(settings: CheckpointSettings, found: Optional[Path]) -> Optional[Path]:
    """Return the newest checkpoint that all ranks see whole, None where none sees any. Every rank calls this.

    Args:
        settings: Folder and settings of the run.
        found: Result of `find_checkpoint` on this rank.

    Raises:
        AgreedError: Some rank sees none of the checkpoints that others see, or the settings differ from those of the
            checkpoint.
    """
    names = gather_from_all(found.name if found is not None else None)
    if len(set(names)) == 1:
        return found
    seen = [set(each) for each in gather_from_all([path.name for path in whole_checkpoints(settings.output_dir)])]
    common, problem = max(set.intersection(*seen), default=None), None
    if common is None:
        rank = next(rank for rank, each in enumerate(seen) if each != set.union(*seen))
        raise_together(
            CheckpointError(
                "train.output_dir",
                settings.output_dir,
                f"has no checkpoint that every rank sees whole: rank {rank} sees {sorted(seen[rank]) or 'none'} of "
                f"{sorted(set.union(*seen))}; the folder must lie on a file system that all nodes share",
            )
        )
    path = checkpoint_root(settings.output_dir) / str(common)
    try:
        check_settings(settings, path)
    except ValueError as error:
        problem = error
    raise_together(problem)
    return path


def restore_checkpoint(path: Path, policy: PolicyEngine, loader: PromptLoader, train_vision: bool) -> int:
    """Load a checkpoint of any layout and return its number of steps done. Every rank calls this.

    Args:
        path: Folder of the checkpoint.
        policy: Engine whose master weights and moments are overwritten.
        loader: Loader whose position in the data is set.
        train_vision: Whether the vision tower is trained.

    Raises:
        AgreedError: Some rank could not read its files, or the checkpoint is of another model.
    """
    problem, step = None, 0
    try:
        step = _restore(path, policy, loader, train_vision)
    except (OSError, ValueError) as error:
        problem = error
    raise_together(problem)
    return step


def _restore(path: Path, policy: PolicyEngine, loader: PromptLoader, train_vision: bool) -> int:
    manifest = read_manifest(path)
    manifest.check_model(path, policy.shape, train_vision)
    layout, old = policy.layout, manifest.layout
    same = old.with_rank(layout.rank) == layout
    position = read_json(path / position_file(layout.rank if same else 0), "loader", "num_steps_taken", "random")
    state = (
        OwnShards(path / state_file(layout.rank))
        if same
        else ReshardedState(policy.shape, old, layout, lambda rank: path / state_file(rank))
    )
    policy.load_state(state, position["num_steps_taken"])
    state.close()
    loader.restore(position["loader"])
    if same:
        set_random_state(position["random"])
    return manifest.step
