"""Writing of checkpoints, in a thread while training goes on, or at once.

    save      every rank copies its state to the host's memory; a thread writes it to <step>.partial and syncs the file
    poll      at later step boundaries the ranks ask each other whether every file is there; when all are, the first rank
              writes the manifest and renames the folder

At most one save is in flight: the next one, and `finish`, wait for it. A save that waits (`wait=True`, or
train.async_checkpoint = false) writes tensor by tensor and takes no copy. A rank that is killed leaves a folder without a
manifest, which is passed over and removed at the next save. Agreement is by collectives in the main thread alone.
"""

import json
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Iterator, Optional

import torch
from torch import Tensor

from megatron_ral.config import RunConfig, dump_config
from megatron_ral.data.loader import PromptLoader
from megatron_ral.weights.safetensors_files import SafetensorsWriter
from megatron_ral.errors import CheckpointError
from megatron_ral.parallel.collectives import gather_from_all, raise_together
from megatron_ral.runtime.progress import tick
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
from megatron_ral.runtime.random_state import random_state
from megatron_ral.training.step import Engines


@dataclass
class _Saving:
    """One save of this rank."""

    step: int
    partial: Path
    texts: dict[str, str]
    """Small files by name."""
    files: Optional[dict[str, int]] = None
    """Bytes of the files that this rank wrote, once they are on disk."""
    problem: Optional[Exception] = None
    thread: Optional[threading.Thread] = field(default=None, repr=False)
    num_written: int = 0
    """Tensors so far."""

    def write(
        self, state_name: str, state: Iterator[tuple[str, Tensor]], entries: list[tuple[str, torch.dtype, torch.Size]]
    ) -> None:
        """Write this rank's files; what goes wrong is kept for `CheckpointWriter.poll`."""
        try:
            sizes = {name: write_synced(self.partial / name, text) for name, text in self.texts.items()}
            writer = SafetensorsWriter(self.partial / state_name, entries)
            try:
                for name, value in state:
                    writer.add(name, value)
                    self.num_written += 1
                    if self.thread is None:
                        tick()
            finally:
                writer.close(sync=True)
            self.files = {**sizes, state_name: (self.partial / state_name).stat().st_size}
        except Exception as error:  # in a thread there is nobody above to catch it
            self.problem = error


class CheckpointWriter:
    """Saves of one run; every rank makes one and makes the same calls.

    Args:
        config: saved with every checkpoint; train.output_dir, keep_checkpoints and async_checkpoint say where and how.
        engines: policy and, for target `ema`, the average.
        loader: position in the data.
    """

    def __init__(self, config: RunConfig, engines: Engines, loader: PromptLoader):
        self.config, self.engines, self.loader = config, engines, loader
        self.layout, self.root = engines.policy.layout, checkpoint_root(config.train.output_dir)
        self._saving: Optional[_Saving] = None
        self._last_step: Optional[int] = None
        self._host: dict[str, Tensor] = {}

    def save(self, step: int, wait: bool = False) -> None:
        """Save the state after `step` steps, unless that was the last one saved.

        Args:
            wait: come back when the checkpoint is whole (the last save of a run, one asked for by a signal).

        Raises:
            AgreedError: this save, or the one still in flight, could not be written by some rank.
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
        saving = _Saving(step, self.root / f"{folder_name(step)}.partial", self._texts())
        in_thread = self.config.train.async_checkpoint and not wait
        state = self._copied() if in_thread else self._state()
        entries = [
            (name, value.dtype, value.shape) for name, value in (self._host.items() if in_thread else self._state())
        ]
        arguments = state_file(self.layout.rank), state, entries
        self._saving = saving
        if in_thread:
            saving.thread = threading.Thread(target=saving.write, args=arguments, daemon=True, name="checkpoint")
            saving.thread.start()
        else:
            saving.write(*arguments)
            self.finish()

    def poll(self) -> None:
        """At a step boundary: make the save in flight whole if every rank's files are there.

        Raises:
            AgreedError: some rank could not write its files.
        """
        if self._saving is not None:
            self._settle(self._saving)

    def finish(self) -> None:
        """Wait until the save in flight is whole. Raises: as for `poll`."""
        if self._saving is not None:
            thread, seen = self._saving.thread, -1
            while thread is not None and thread.is_alive():
                thread.join(1.0)
                if self._saving.num_written != seen:  # a sign of life as long as it gets on
                    seen = self._saving.num_written
                    tick()
            self._settle(self._saving)
            assert self._saving is None, "every rank has joined its thread"

    def _settle(self, saving: _Saving) -> None:
        final = self.root / folder_name(saving.step)
        problem, files = saving.problem, saving.files
        found = gather_from_all((files, None if problem is None else str(_unwritable(final, problem))))
        failed = [(rank, text) for rank, (_, text) in enumerate(found) if text is not None]
        if failed:
            self._saving = None
            rank, text = failed[0]
            raise_together(CheckpointError(text) if rank == self.layout.rank else None)
        if any(files is None for files, _ in found):
            return
        problem = None
        if self.layout.rank == 0:
            try:
                finish_folder(
                    self.root,
                    self._manifest(saving.step, {name: size for files, _ in found for name, size in files.items()}),
                    self.config.train.keep_checkpoints,
                )
            except OSError as error:
                problem = _unwritable(final, error)
        self._saving = None
        raise_together(problem)
        self._last_step = saving.step

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
            self.engines.policy.shape,
            self.layout.tensor_size,
            self.layout.pipeline_size,
            self.config.model.train_vision,
        )

    def _texts(self) -> dict[str, str]:
        position = {
            "loader": self.loader.state(),
            "num_steps_taken": self.engines.policy.num_steps_taken,
            "random": random_state(),
        }
        texts = {position_file(self.layout.rank): json.dumps(position)}
        return {**texts, CONFIG: dump_config(self.config)} if self.layout.rank == 0 else texts

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.engines.policy.state()
        if self.engines.average is not None:
            yield from self.engines.average.state()

    def _copied(self) -> Iterator[tuple[str, Tensor]]:
        """The state in the host's memory, which is kept for the next save (page-locked beside a GPU)."""
        pinned = self.engines.policy.process_groups.device.type == "cuda"
        for name, value in self._state():
            if name not in self._host:
                self._host[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
            self._host[name].copy_(value.detach(), non_blocking=pinned)
        if pinned:
            torch.cuda.synchronize()
        return iter(self._host.items())


def _unwritable(final: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"checkpoint '{final}' could not be written ({error}); the one before it is still whole")
