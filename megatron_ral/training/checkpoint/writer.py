"""Writing of checkpoints, in a thread while training goes on, or at once.

    save      every rank copies its state to the host's memory; a thread writes it to <step>.partial and syncs the file
    poll      at later step boundaries the ranks ask each other whether every file is there; when all are, the first
              rank writes the manifest and renames the folder

At most one save is in flight, because the next save, and `finish`, wait for it. A save that waits (`wait=True`, or
train.async_checkpoint = false) writes tensor by tensor and makes no copy. A rank that is killed leaves a folder without
a manifest. Such a folder is never resumed from, and the next save removes it. Ranks agree by collectives in the main
thread only.
"""

import json
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Iterator, Mapping, Optional

import torch
from torch import Tensor

from megatron_ral.data.loader import PromptLoader
from megatron_ral.engine.policy import PolicyEngine
from megatron_ral.errors import CheckpointError
from megatron_ral.parallel.collectives import gather_from_all, raise_together
from megatron_ral.runtime.progress import tick
from megatron_ral.runtime.random_state import random_state
from megatron_ral.training.checkpoint.files import (
    CONFIG,
    Manifest,
    begin_folder,
    checkpoint_root,
    finish_folder,
    folder_name,
    parameter_tables,
    position_file,
    state_file,
    write_synced,
)
from megatron_ral.training.checkpoint.host_blocks import HostBlocks
from megatron_ral.training.checkpoint.inputs import INPUTS, input_files
from megatron_ral.training.checkpoint.settings import CheckpointSettings
from megatron_ral.weights.safetensors_files import SafetensorsWriter


@dataclass
class _Save:
    """One save of this rank."""

    step: int
    partial: Path
    """Folder that is written to until every rank is done."""
    contents: Mapping[str, str | bytes]
    """Contents of the small files by name."""
    outcome: dict[str, int] | Exception | None = None
    """Size in bytes of each file that this rank wrote, or the error; None while the files are being written."""
    thread: Optional[threading.Thread] = field(default=None, repr=False)
    """Thread that writes; None for a save in the main thread."""
    num_written: int = 0
    """Number of tensors written so far."""

    def write(
        self, state_name: str, state: Iterator[tuple[str, Tensor]], entries: list[tuple[str, torch.dtype, torch.Size]]
    ) -> None:
        """Write this rank's files. An error is stored for `CheckpointWriter.poll`, because a thread cannot raise it.

        Args:
            state_name: Name of the file for the state.
            state: Tensors of the state by name.
            entries: Name, type and shape of the same tensors in the same order.
        """
        try:
            sizes = {name: write_synced(self.partial / name, content) for name, content in self.contents.items()}
            writer = SafetensorsWriter(self.partial / state_name, entries)
            try:
                for name, value in state:
                    writer.add(name, value)
                    self.num_written += 1
                    if self.thread is None:
                        tick()
            finally:
                writer.close(sync=True)
            self.outcome = {**sizes, state_name: (self.partial / state_name).stat().st_size}
        except Exception as error:
            self.outcome = error


class CheckpointWriter:
    """Writer of a run's checkpoints. Every rank has one and makes the same calls.

    Args:
        settings: Folder, number of checkpoints to keep, and the configuration that is saved with each.
        policy: Engine whose master weights and moments are saved.
        loader: Loader whose position in the data is saved.
    """

    def __init__(self, settings: CheckpointSettings, policy: PolicyEngine, loader: PromptLoader):
        self.settings, self.policy, self.loader = settings, policy, loader
        self.layout, self.root = policy.layout, checkpoint_root(settings.output_dir)
        self._save: Optional[_Save] = None
        self._last_step: Optional[int] = None
        self._host: dict[str, Tensor] = {}
        self._blocks = HostBlocks(policy.process_groups.device.type == "cuda")
        self._inputs = json.dumps(input_files(settings.values), indent=1) if self.layout.rank == 0 else ""
        """List of the files that the run reads, as they are when it starts."""

    def save(self, step: int, wait: bool = False, files: Mapping[str, bytes] = MappingProxyType({})) -> None:
        """Save the state after `step` steps, unless that was the last step saved.

        Args:
            step: Number of steps done.
            wait: Whether to return only when the checkpoint is whole (the last save of a run, or one that a signal
                asked for).
            files: Contents of further small files of this rank, by name.

        Raises:
            AgreedError: Some rank could not write its files of this save, or of the one that was still in flight.
        """
        self.finish()
        if self._last_step == step:
            return
        problem = None
        if self.layout.rank == 0:
            try:
                begin_folder(self.root, step)
            except OSError as error:
                problem = _unwritable(self.root / folder_name(step), error)
        raise_together(problem)
        save = _Save(step, self.root / f"{folder_name(step)}.partial", {**self._texts(), **files})
        in_thread = self.settings.in_thread and not wait
        state = self._copy_state() if in_thread else self.policy.state()
        entries = [
            (name, value.dtype, value.shape)
            for name, value in (self._host.items() if in_thread else self.policy.state())
        ]
        arguments = state_file(self.layout.rank), state, entries
        self._save = save
        if in_thread:
            save.thread = threading.Thread(target=save.write, args=arguments, daemon=True, name="checkpoint")
            save.thread.start()
        else:
            save.write(*arguments)
            self.finish()

    def poll(self) -> None:
        """Finish the save in flight if the files of every rank are there. Every rank calls this at a step boundary.

        Raises:
            AgreedError: Some rank could not write its files.
        """
        if self._save is not None:
            self._settle(self._save)

    def finish(self) -> None:
        """Wait until the save in flight is whole. Every rank calls this.

        Raises:
            AgreedError: Some rank could not write its files.
        """
        if self._save is not None:
            thread, seen = self._save.thread, -1
            while thread is not None and thread.is_alive():
                thread.join(1.0)
                if self._save.num_written != seen:  # progress is reported only as long as the thread makes some
                    seen = self._save.num_written
                    tick()
            self._settle(self._save)
            assert self._save is None, "every rank has joined its thread"

    def _settle(self, save: _Save) -> None:
        """Finish a save whose files are all there, or raise on every rank where some rank failed."""
        final, outcome = self.root / folder_name(save.step), save.outcome
        found = gather_from_all(_unwritable(final, outcome) if isinstance(outcome, Exception) else outcome)
        failed = [rank for rank, each in enumerate(found) if isinstance(each, CheckpointError)]
        if failed:
            self._save = None
            raise_together(found[failed[0]] if failed[0] == self.layout.rank else None)
        if any(files is None for files in found):
            return
        problem = None
        if self.layout.rank == 0:
            sizes = {name: size for files in found for name, size in files.items()}
            try:
                finish_folder(self.root, self._manifest(save.step, sizes), self.settings.num_to_keep)
            except OSError as error:
                problem = _unwritable(final, error)
        self._save = None
        raise_together(problem)
        self._last_step = save.step

    def _manifest(self, step: int, files: dict[str, int]) -> Manifest:
        layout = self.layout
        return Manifest(
            step,
            layout.world_size,
            layout.tensor_size,
            layout.pipeline_size,
            self._parameters,
            dict(sorted(files.items())),
        )

    @cached_property
    def _parameters(self) -> list[dict[str, Any]]:
        return parameter_tables(
            self.policy.shape, self.layout.tensor_size, self.layout.pipeline_size, self.settings.train_vision
        )

    def _texts(self) -> dict[str, str]:
        """Return the contents of this rank's small files by name."""
        position = {
            "loader": self.loader.state(),
            "num_steps_taken": self.policy.num_steps_taken,
            "random": random_state(),
        }
        texts = {position_file(self.layout.rank): json.dumps(position)}
        return {**texts, CONFIG: self.settings.config_text, INPUTS: self._inputs} if self.layout.rank == 0 else texts

    def _copy_state(self) -> Iterator[tuple[str, Tensor]]:
        """Copy the state to the host's memory, page-locked beside a GPU, and return an iterator over the copies.

        The memory is used again by the next save.
        """
        for name, value in self.policy.state():
            if name not in self._host:
                self._host[name] = self._blocks.empty(value.shape, value.dtype)
            self._host[name].copy_(value.detach(), non_blocking=self._blocks.are_pinned)
        if self._blocks.are_pinned:
            torch.cuda.synchronize()
        return iter(self._host.items())


def _unwritable(final: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"'{final}'", None, f"could not be written ({error}); the checkpoint before it is still whole"
    )
