"""The folders of checkpoints: what is whole, what a manifest says, how files reach the disk.

A folder is whole when its manifest is there and every file that it lists has its size. The manifest holds the layout and
the shape and cut of every parameter with state, so that what a rank's file is a part of can be told without a model.
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
"""Version 1 had no format, no version and no parameters in its manifest, and a position for each layout."""


def checkpoint_root(output_dir: str) -> Path:
    return Path(output_dir) / "checkpoints"


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def state_file(rank: int) -> str:
    """Master weights, moments and average of one rank."""
    return f"rank_{rank:05d}.safetensors"


def position_file(rank: int) -> str:
    """Place in the data, number of steps, random states of one rank."""
    return f"rank_{rank:05d}.json"


@dataclass(frozen=True)
class Manifest:
    """What a whole checkpoint says of itself."""

    step: int
    world_size: int
    tensor_size: int
    pipeline_size: int
    parameters: list[dict[str, Any]]
    """For each pipeline stage: name -> shape on one tensor rank, dimension cut over them, equal blocks cut each."""
    files: dict[str, int]
    """Name -> bytes."""

    @property
    def layout(self) -> RankLayout:
        """Of rank 0."""
        return RankLayout(0, self.world_size, self.tensor_size, self.pipeline_size)

    def text(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)

    def check_model(self, path: Path, shape: ModelShape, train_vision: bool) -> None:
        """Raise CheckpointError naming the first parameter that a model of `shape` would hold otherwise in this layout."""
        wanted = parameter_tables(shape, self.tensor_size, self.pipeline_size, train_vision)
        for stage, (ours, theirs) in enumerate(zip(wanted, self.parameters, strict=True)):
            for name in sorted(ours.keys() | theirs.keys()):
                if ours.get(name) != theirs.get(name):
                    raise CheckpointError(
                        f"checkpoint '{path}' holds parameter '{name}' of stage {stage} as "
                        f"{theirs.get(name)}, but '{shape.path}' has {ours.get(name)}; it is of another "
                        "model, start in another train.output_dir"
                    )


def parameter_tables(
    shape: ModelShape, tensor_size: int, pipeline_size: int, train_vision: bool
) -> list[dict[str, Any]]:
    """What `Manifest.parameters` has for a model whose trainable parameters have state."""
    return [
        {
            name: {"shape": list(held.shape), "cut_dim": held.tensor.cut_dim, "blocks": held.tensor.interleaved}
            for name, held in stage.items()
            if train_vision or not name.startswith("visual.")
        }
        for stage in held_parameters(shape, tensor_size, pipeline_size)
    ]


def read_manifest(folder: Path) -> Manifest:
    """Manifest of a folder that has one.

    Raises:
        CheckpointError: of another version or another program.
        OSError, ValueError: unreadable, cut short.
    """
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format", FORMAT) != FORMAT or "files" not in content:
        raise CheckpointError(f"'{folder / MANIFEST}' was not written by this program; give another train.output_dir")
    version = content.get("version", 1)
    if version != VERSION:
        raise CheckpointError(
            f"checkpoint '{folder}' has version {version} of the format, this program reads version "
            f"{VERSION}; resume it with the program that wrote it, or start in another train.output_dir"
        )
    try:
        return Manifest(**{name: content[name] for name in Manifest.__dataclass_fields__})
    except KeyError as error:
        raise CheckpointError(
            f"'{folder / MANIFEST}' has no {error}; it was changed, give another train.output_dir"
        ) from None


def damage(folder: Path) -> Optional[str]:
    """Why a folder is not a whole checkpoint; None where it is.

    Raises:
        CheckpointError: of another version or another program.
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
    """Whole checkpoints, oldest first.

    Args:
        warn: name every folder newer than the newest whole one that is passed over, and why.

    Raises:
        CheckpointError: the newest that is not damaged is of another version or another program.
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
    """Newest whole checkpoint, or None. Arguments and errors: as for `whole_checkpoints`."""
    return next(reversed(whole_checkpoints(output_dir, warn)), None)


def begin_folder(root: Path, step: int) -> None:
    """An empty folder for the files of a save; those of saves that were cut off go."""
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob("*.partial"):
        _remove(left)
    (root / f"{folder_name(step)}.partial").mkdir()


def finish_folder(root: Path, manifest: Manifest, keep: int) -> Path:
    """Manifest last, then the folder gets its name and the link `latest`; whole ones beyond the newest `keep` go."""
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
    _remove_old(root, final, keep)
    return final


def _remove_old(root: Path, newest: Path, keep: int) -> None:
    """Damaged ones do not count, and go with the whole ones that are older."""
    older = [folder for folder in sorted(root.glob("step_????????")) if folder.name < newest.name]
    whole = [folder for folder in older if (folder / MANIFEST).is_file()]
    oldest_kept = [*whole, newest][-keep:][0]
    for folder in older:
        if folder.name < oldest_kept.name:
            _remove(folder)


def _remove(path: Path) -> None:
    """As far as the file system lets: what is left over does no harm, and the next save tries again."""
    try:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        logger.warning("'%s' could not be removed (%s)", path, error)


def write_synced(path: Path, text: str) -> int:
    """Write a text file through to the disk; returns its bytes."""
    data = text.encode()
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return len(data)


def sync_folder(path: Path) -> None:
    """Let the names in a folder reach the disk, as far as the file system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems do not know it
        logger.debug("fsync of folder '%s': %s", path, error)
    finally:
        os.close(handle)
