"""Folders of checkpoints: which are whole, what the manifest holds, and how files reach the disk.

A folder is whole when it has a manifest and every file that the manifest lists has the listed size. The manifest holds
the layout and, for every parameter with state, its shape and how it is cut over tensor ranks. A rank's file can thus be
understood without building a model.
"""

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

from megatron_ral.errors import CheckpointError
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.weights.resharding import held_parameters

logger = logging.getLogger(__name__)

MANIFEST, CONFIG = "manifest.json", "config.yaml"
FORMAT, VERSION = "megatron_ral checkpoint", 2
"""Name and version of the format. Version 1 had neither of them nor parameters in its manifest, and saved the position
in the data once per layout."""


def checkpoint_root(output_dir: str) -> Path:
    """Return the folder that holds the checkpoints of a run."""
    return Path(output_dir) / "checkpoints"


def folder_name(step: int) -> str:
    """Return the name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def state_file(rank: int) -> str:
    """Return the name of the file with one rank's master weights and optimizer moments."""
    return f"rank_{rank:05d}.safetensors"


def position_file(rank: int) -> str:
    """Return the name of the file with one rank's position in the data, number of steps and random states."""
    return f"rank_{rank:05d}.json"


@dataclass(frozen=True)
class Manifest:
    """Description of a whole checkpoint, written last."""

    step: int
    """Number of steps done."""
    world_size: int
    """Number of ranks that wrote the checkpoint."""
    tensor_size: int
    """Number of tensor-parallel ranks."""
    pipeline_size: int
    """Number of pipeline stages."""
    parameters: list[dict[str, Any]]
    """Per pipeline stage: name -> shape on one tensor rank, dimension cut over tensor ranks, number of equal blocks
    that are cut separately."""
    files: dict[str, int]
    """Size in bytes by file name."""

    @property
    def layout(self) -> RankLayout:
        """Layout in which the checkpoint was written, as rank 0 sees it."""
        return RankLayout(0, self.world_size, self.tensor_size, self.pipeline_size)

    def text(self) -> str:
        """Return the JSON text of the manifest."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)

    def check_model(self, path: Path, shape: ModelShape, train_vision: bool) -> None:
        """Compare the parameters with those that a model of `shape` has in the layout of the checkpoint.

        Args:
            path: Folder of the checkpoint, named in the error.
            shape: Shape of the model.
            train_vision: Whether the vision tower of the model is trained.

        Raises:
            CheckpointError: A parameter differs; the error names the first one.
        """
        wanted = parameter_tables(shape, self.tensor_size, self.pipeline_size, train_vision)
        for stage, (ours, theirs) in enumerate(zip(wanted, self.parameters, strict=True)):
            for name in sorted(ours.keys() | theirs.keys()):
                if ours.get(name) != theirs.get(name):
                    raise CheckpointError(
                        f"'{path}'",
                        None,
                        f"holds parameter '{name}' of stage {stage} as {theirs.get(name)}, but '{shape.path}' has "
                        f"{ours.get(name)}; the checkpoint is of another model, start in another train.output_dir",
                    )


def parameter_tables(
    shape: ModelShape, tensor_size: int, pipeline_size: int, train_vision: bool
) -> list[dict[str, Any]]:
    """Return `Manifest.parameters` of a model of `shape`: per pipeline stage, its trained parameters by name."""
    return [
        {
            name: {"shape": list(held.shape), "cut_dim": held.tensor.cut_dim, "blocks": held.tensor.interleaved}
            for name, held in stage.items()
            if shape.is_trained(name, train_vision)
        }
        for stage in held_parameters(shape, tensor_size, pipeline_size)
    ]


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder that has one.

    Raises:
        CheckpointError: The manifest is of another version or was written by another program.
        OSError, ValueError: The manifest is unreadable or cut short.
    """
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    path = f"'{folder / MANIFEST}'"
    if not isinstance(content, dict) or content.get("format", FORMAT) != FORMAT or "files" not in content:
        raise CheckpointError(path, None, "was not written by this program; give another train.output_dir")
    version = content.get("version", 1)
    if version != VERSION:
        raise CheckpointError(
            f"'{folder}'",
            None,
            f"has version {version} of the format, this program reads version {VERSION}; resume it with the program "
            "that wrote it, or start in another train.output_dir",
        )
    try:
        return Manifest(**{name: content[name] for name in Manifest.__dataclass_fields__})
    except KeyError as error:
        raise CheckpointError(path, None, f"has no {error}; it was changed, give another train.output_dir") from None


def damage(folder: Path) -> Optional[str]:
    """Return the reason why a folder is not a whole checkpoint, None where it is whole.

    Raises:
        CheckpointError: The manifest is of another version or was written by another program.
    """
    if folder.suffix == ".partial" or not (folder / MANIFEST).is_file():
        return f"its save was cut off before {MANIFEST}"
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is not readable ({error})"
    for name, size in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"file '{name}' is missing"
        if path.stat().st_size != size:
            return f"file '{name}' has {path.stat().st_size:,} bytes instead of {size:,}"
    return None


def whole_checkpoints(output_dir: str, warn: bool = False) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first.

    Args:
        output_dir: Folder of the run.
        warn: Whether a warning names every folder newer than the newest whole one, and the reason why it is not whole.

    Raises:
        CheckpointError: The newest undamaged one is of another version or was written by another program.
    """
    whole: list[Path] = []
    root = checkpoint_root(output_dir)
    for folder in sorted([*root.glob("step_????????"), *root.glob("step_????????.partial")], reverse=True):
        try:
            reason = damage(folder)
        except CheckpointError:
            if not whole:
                raise
            continue
        if reason is None:
            whole.insert(0, folder)
        elif warn and not whole:
            logger.warning("checkpoint '%s' is passed over: %s", folder, reason)
    return whole


def newest_checkpoint(output_dir: str, warn: bool = False) -> Optional[Path]:
    """Return the newest whole checkpoint of a run, None where there is none.

    Arguments and errors are those of `whole_checkpoints`.
    """
    return next(reversed(whole_checkpoints(output_dir, warn)), None)


def begin_folder(root: Path, step: int) -> None:
    """Make an empty folder for the files of a save, and remove the folders of saves that were cut off."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob("*.partial"):
        _remove(leftover)
    (root / f"{folder_name(step)}.partial").mkdir()


def finish_folder(root: Path, manifest: Manifest, num_to_keep: int) -> Path:
    """Write the manifest, give the folder its final name, point the link `latest` at it, and remove old checkpoints.

    Args:
        root: Folder of the checkpoints.
        manifest: Manifest of the save that is finished.
        num_to_keep: Number of most recent checkpoints to keep.

    Returns:
        The finished folder.
    """
    final, partial = root / folder_name(manifest.step), root / f"{folder_name(manifest.step)}.partial"
    write_synced(partial / MANIFEST, manifest.text())
    sync_folder(partial)
    if final.exists():  # a damaged one of the same step
        final.rename(root / f"{final.name}.damaged.partial")
    partial.rename(final)
    link = root / "latest.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, root / "latest")
    sync_folder(root)
    shutil.rmtree(root / f"{final.name}.damaged.partial", ignore_errors=True)
    _remove_old(root, final, num_to_keep)
    return final


def _remove_old(root: Path, newest: Path, num_to_keep: int) -> None:
    """Remove the checkpoints that are older than the newest `num_to_keep` whole ones, damaged ones among them."""
    older = [folder for folder in sorted(root.glob("step_????????")) if folder.name < newest.name]
    whole = [folder for folder in older if (folder / MANIFEST).is_file()]
    oldest_to_keep = [*whole, newest][-num_to_keep:][0]
    for folder in older:
        if folder.name < oldest_to_keep.name:
            _remove(folder)


def _remove(path: Path) -> None:
    """Remove a folder or link, with a warning where the file system does not allow it.

    A leftover does no harm, and the next save tries again.
    """
    try:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        logger.warning("'%s' could not be removed (%s)", path, error)


def write_synced(path: Path, content: str | bytes) -> int:
    """Write a file, wait until it is on the disk, and return its size in bytes."""
    data = content.encode() if isinstance(content, str) else content
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return len(data)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system supports it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems do not support fsync on folders
        logger.debug("fsync of folder '%s': %s", path, error)
    finally:
        os.close(handle)
