"""Facts that one rank reports about itself before a launch: versions, GPUs, shards, model files, disk, network."""

import contextlib
import hashlib
import importlib.metadata
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Mapping, Optional, Sequence

import torch

from megatron_ral.config import RunConfig, flat_settings
from megatron_ral.data.shards import find_shards
from megatron_ral.errors import CheckpointError, DataError
from megatron_ral.models.folder import config_folder
from megatron_ral.models.shape import ModelShape
from megatron_ral.planning.disk import DiskPlan
from megatron_ral.planning.launch_issues import LaunchIssue
from megatron_ral.weights.conversion import check_weights, open_weights

PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers")
"""Packages whose versions must be the same on every rank."""


@dataclass(frozen=True)
class LaunchSettings:
    """Settings of a run that its preflight compares and checks."""

    resolved: Mapping[str, str]
    """Every resolved setting as text, by dotted key."""
    shards: Mapping[str, str]
    """Globs of shards by key; an empty one stands for no data."""
    models: Mapping[str, str]
    """Folders of models by key."""
    disk: DiskPlan
    """Settings that decide how much the run writes, with its output folder."""
    timeout_seconds: float
    """Limit of every wait for other ranks."""

    @classmethod
    def from_config(cls, config: RunConfig) -> "LaunchSettings":
        """Return the settings of a run."""
        models = {
            "model.path": config.model.path,
            "model.reference_path": config.model.reference_path,
            "teacher.path": config.teacher.path if config.distills else "",
        }
        shards = {f"data.train.{number}.shards": source.shards for number, source in enumerate(config.data.train)}
        return cls(
            {key: str(value) for key, value in flat_settings(config).items()},
            {**shards, "data.eval_shards": config.data.eval_shards},
            {key: path for key, path in models.items() if path},
            DiskPlan.from_config(config),
            60.0 * config.parallel.timeout_minutes,
        )


def launch_facts(settings: LaunchSettings) -> dict[str, str]:
    """Return the facts that must be the same on every rank, by name.

    Raises:
        OSError: a file cannot be read.
    """
    facts = {package: importlib.metadata.version(package) for package in PACKAGES}
    facts["megatron_ral"] = source_digest(Path(__file__).parents[1])
    facts["GPUs"] = "none"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0)))
        facts["GPUs"] = f"{torch.cuda.device_count()} x {device.name}, {device.total_memory / 2**30:.0f} GiB"
    for key, pattern in settings.shards.items():
        try:
            facts[key] = _listing(Path(shard) for shard in find_shards(pattern, key)) if pattern else "none"
        except DataError:  # reported when the inputs were opened
            continue
    for key, path in settings.models.items():
        folders = {Path(path), config_folder(path)}
        facts[key] = _listing(
            file for folder in folders if folder.is_dir() for file in folder.iterdir() if file.is_file()
        )
    return facts


def source_digest(folder: Path) -> str:
    """Return a short digest of every Python file below a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*.py") if path.is_file()):  # an editor's lock is a dangling link
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _listing(files: Iterable[Path]) -> str:
    sizes = sorted((path.name, path.stat().st_size) for path in files)
    digest = hashlib.sha256(repr(sizes).encode()).hexdigest()[:6]
    return f"{len(sizes)} files, {sum(size for _, size in sizes)} bytes, names and sizes {digest}"


def weight_issues(
    models: Mapping[str, str], shape: Optional[ModelShape], teacher: Optional[ModelShape]
) -> list[LaunchIssue]:
    """Return the issues of model folders whose weights do not match their config.json. Only headers are read.

    Args:
        models: folders by key.
        shape: model of the policy and the reference; None where it could not be read.
        teacher: model of the teacher; None where there is none.
    """
    issues = []
    for key, path in models.items():
        expected = teacher if key == "teacher.path" else shape
        try:
            if expected is not None:
                check_weights(open_weights(path), expected)
        except CheckpointError as error:
            lines = str(error).splitlines()
            text = "; ".join(" ".join(line.split()) for line in lines[:4])
            text += f"; and {len(lines) - 4} more" * (len(lines) > 4)
            issues.append(LaunchIssue(key, f"'{path}'", f"{text}; complete the folder or name another"))
    return issues


# ---- disk ------------------------------------------------------------------------------------------------------------


def missing_parents(folder: Path) -> list[Path]:
    """Return the folder and its parents that do not exist yet, innermost first."""
    return [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]


def write_probe(folder: Path, name: str) -> Optional[LaunchIssue]:
    """Write a small file into the output folder; returns an issue where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(socket.gethostname())
    except OSError as error:
        return LaunchIssue(
            "train.output_dir",
            f"'{folder}'",
            f"cannot be written to ({error.strerror}); give a folder on a disk that all nodes share and this user may "
            "write to",
        )
    return None


def remove_file(path: Path) -> None:
    """Remove a file if it is there and may be removed."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder if it is empty and may be removed."""
    with contextlib.suppress(OSError):
        path.rmdir()


def appears(path: Path, seconds: float = 10.0) -> bool:
    """Return whether a file exists within some seconds, because network file systems may show a new file late."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        try:
            os.listdir(path.parent)
            time.sleep(0.1)
        except OSError:
            return False
    return True


# ---- network ---------------------------------------------------------------------------------------------------------


def listen() -> tuple[socket.socket, tuple[str, int]]:
    """Return a listening socket on a free port, as the process groups and the watchdog will use, and its address."""
    server = socket.create_server(("", 0), backlog=1024)
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    return server, (address, server.getsockname()[1])


def unreachable_ports(ports: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Return (node, address, port, error) of every (node, address, port) that cannot be reached."""
    failed = []
    for node, address, port in ports:
        try:
            socket.create_connection((address, port), timeout=10.0).close()
        except OSError as error:
            failed.append([node, address, port, str(error)])
    return failed
