"""Runs that resume in another layout; saves in a thread, saves cut off, saves that fail on one rank."""

import dataclasses
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ral.commands.convert import main as convert_checkpoint
from megatron_ral.config import load_config
from megatron_ral.engine.settings import shape_from_config
from megatron_ral.errors import AgreedError
from megatron_ral.parallel.collectives import barrier
from megatron_ral.parallel.process_groups import start_groups, stop_groups
from megatron_ral.runtime.random_state import random_state, seed_random_state
from megatron_ral.training.checkpoint.files import newest_checkpoint, read_manifest, whole_checkpoints
from megatron_ral.training.checkpoint.restore import agree_on_checkpoint, find_checkpoint, restore_checkpoint
from megatron_ral.training.checkpoint.settings import CheckpointSettings, read_saved_config
from megatron_ral.training.checkpoint.writer import CheckpointWriter
from megatron_ral.training.trainer import Inputs, Trainer
from megatron_ral.weights.conversion import differing_weights
from megatron_ral.weights.resharding import held_parameters
from megatron_ral.weights.tensor_table import stage_tables
from tests.conftest import PROJECT
from tests.distributed.runner import run_ranks
from tests.integration.cases import RL, SFT, write_config

# The key bias has a gradient of rounding size only; with AdamW's usual eps its sign alone would decide.
COMMON = [
    "train.keep_checkpoints=9",
    "optimizer.eps=1.0e-5",
    "train.export=false",
    "train.num_steps=4",
    "logging.eval_interval=0",
    "logging.probe_interval=0",
]


def open_trainer(path: str, overrides: list[str], resume: bool) -> Trainer:
    config = load_config(path, overrides)
    process_groups = start_groups(
        tensor_size=config.parallel.tensor_model_parallel_size,
        pipeline_size=config.parallel.pipeline_model_parallel_size,
        seed=config.seed,
    )
    return Trainer(config, shape_from_config(config), process_groups, Inputs.open(config, resume))


def restore(trainer: Trainer) -> int:
    """Load the checkpoint that the run is to resume from, and return its number of steps."""
    train_vision = trainer.config.model.train_vision
    return restore_checkpoint(trainer.inputs.checkpoint, trainer.policy, trainer.loader, train_vision)


def run(path: str, overrides: list[str], again: str = "") -> bool:
    """Make a run; with `again`, resume it and first save the restored state once more in that folder.

    Returns whether the global random generators are as they were.
    """
    trainer = open_trainer(path, overrides, bool(again))
    if again:
        step = restore(trainer)
        settings = CheckpointSettings.from_config(load_config(path, [*overrides, f"train.output_dir={again}"]))
        CheckpointWriter(settings, trainer.policy, trainer.loader).save(step, wait=True)
    seed_random_state(trainer.config.seed, trainer.layout.rank)  # as the run does
    before = random_state()
    trainer.run()
    after = random_state()
    stop_groups()
    return before == after


def layout_settings(layout: tuple[int, int, int]) -> list[str]:
    return [f"parallel.tensor_model_parallel_size={layout[0]}", f"parallel.pipeline_model_parallel_size={layout[1]}"]


def whole_state(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the state by Hugging Face name, joined from all ranks' files by the table of exports.

    Copies of a tensor are checked to be equal.
    """
    manifest, shape, result = read_manifest(folder), shape_from_config(read_saved_config(folder)), {}
    T, place = manifest.tensor_size, manifest.layout
    tables = stage_tables(shape, T, manifest.pipeline_size)
    for stage, held in enumerate(held_parameters(shape, T, manifest.pipeline_size)):
        files = [
            [load_file(folder / f"rank_{place.rank_of(t, d, stage):05d}.safetensors") for d in range(place.data_size)]
            for t in range(T)
        ]
        assert len({float(file["adamw_step"]) for row in files for file in row}) == 1
        result["adamw_step"] = files[0][0]["adamw_step"]
        for tensor in tables[stage]:
            size = torch.Size(held[tensor.name].shape)
            for key in ("{}/master", "{}/exp_avg", "{}/exp_avg_sq"):
                name = key.format(tensor.name)
                if name not in files[0][0]:
                    continue
                parts = [torch.cat([file[name] for file in row])[: size.numel()].view(size) for row in files]
                for copy in parts if tensor.cut_dim is None else [tensor.join(parts, T)]:
                    for source, value in zip(tensor.sources, tensor.split(copy)):
                        value = value[: shape.vocab_size] if "embed" in source or "lm_head" in source else value
                        assert torch.equal(result.setdefault(key.format(source), value), value), (key, source)
    return result


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        (tag, event.step): event.value
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
        if not tag.startswith(("timing", "data", "throughput", "memory", "final"))
    }


def check_like_straight(straight: Path, resumed: Path) -> None:
    """Compare the loss curve and all scalars of steps 3 and 4."""
    wanted, found = scalars(straight), scalars(resumed)
    losses = [tag for tag, step in found if tag.startswith(("loss", "kl")) and step == 3]
    assert losses and {step for _, step in found} == {3, 4}
    for (tag, step), value in found.items():
        other = wanted[tag, step]
        tolerance = 1e-5 if tag in losses else 1e-4
        assert abs(value - other) <= tolerance * max(abs(other), 0.1), (tag, step, value, other)
    curves = [[wanted[tag, step] for step in range(1, 5)] for tag in losses]
    assert any(max(curve) - min(curve) > 0.01 * abs(curve[-1]) > 1e-6 for curve in curves), "no curve"


CASES = {
    "tied, RL": (
        RL,
        "trained",
        (2, 1, 2),
        (1, 2, 1),
        [],
        ["rollout.cache_tokens=150", "train.tokens_per_micro_batch=200"],
    ),
    "a rollout ahead": (
        RL,
        "trained",
        (2, 1, 2),
        (1, 2, 1),
        ["rollout.overlap=true", "rollout.refill_rounds=1"],
        ["rollout.generation_batch_size=2", "train.micro_batch_size=1"],
    ),
    "tied, vision trained": (
        SFT,
        "trained",
        (1, 2, 1),
        (2, 1, 2),
        [],
        ["train.micro_batch_size=1", "parallel.offload_optimizer=true"],
    ),
    "untied": (
        SFT,
        "untied",
        (1, 1, 1),
        (2, 2, 2),
        ["model.train_vision=false"],
        [
            "parallel.sequence_parallel=true",
            "train.micro_batch_size=1",
            "parallel.recompute_activations=true",
            "parallel.gather=layer",
        ],
    ),
    "adapters, RL": (
        RL,
        "trained",
        (2, 1, 2),
        (1, 2, 1),
        ["adapter.rank=3", "adapter.alpha=24.0", "optimizer.learning_rate=0.01", "train.export=true"],
        ["rollout.generation_batch_size=2", "train.micro_batch_size=1", "parallel.gather=layer"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_resumed_in_another_layout_is_like_the_undisturbed_run(material, trained_model, tmp_path, case):
    text, kind, old, new, settings, new_settings = CASES[case]
    model = trained_model if kind == "trained" else material[kind]
    path, overrides = write_config(tmp_path, text, model, material["data"], "rl" if text is RL else "search")
    overrides += [*COMMON, *settings]
    straight, cut, again = (tmp_path / name for name in ("straight", "cut", "again"))
    run_ranks(torch.Size(old).numel(), run, path, [*overrides, *layout_settings(old), f"train.output_dir={straight}"])
    checkpoint = "checkpoints/step_00000002"
    shutil.copytree(straight / checkpoint, cut / checkpoint)
    undisturbed = run_ranks(
        torch.Size(new).numel(),
        run,
        path,
        [*overrides, *layout_settings(new), *new_settings, f"train.output_dir={cut}"],
        str(again),
    )
    assert all(undisturbed), "training drew from a global random generator"
    saved, mapped = whole_state(straight / checkpoint), whole_state(again / checkpoint)
    assert set(saved) == set(mapped)
    assert any(name.startswith("visual.") for name in saved) == ("vision" in case)
    for name, value in saved.items():
        assert torch.equal(mapped[name], value), name
    moments = [value for name, value in saved.items() if name.endswith("exp_avg_sq")]
    assert sum(int(value.count_nonzero()) for value in moments) > 0.5 * sum(value.numel() for value in moments)
    check_like_straight(straight, cut)
    if "adapters" in case:
        assert {name.split("/")[0].split(".")[-2] for name in saved if "/" in name} == {"lora_A", "lora_B"}
        check_exports(straight, tmp_path)


def check_exports(run: Path, folder: Path) -> None:
    """What `convert_checkpoint.py from-run` makes of a checkpoint of adapters is what the run exported, both ways."""
    arguments = ["from-run", "--checkpoint", str(run / "checkpoints/step_00000004"), "--output"]
    assert convert_checkpoint([*arguments, str(folder / "merged")]) == 0
    assert not differing_weights(run / "hf", folder / "merged")
    assert convert_checkpoint([*arguments, str(folder / "alone"), "--adapter"]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / "alone" / name).read_bytes() == (run / "adapter" / name).read_bytes()


def test_entry_point_resumes_in_another_layout(material, trained_model, tmp_path):
    """A run of TP=2 x PP=1 x DP=2 is resumed by the user's command as TP=1 x PP=2 x DP=1.

    A newer checkpoint that is cut short is passed over.
    """
    path, overrides = write_config(tmp_path, SFT, trained_model, material["data"])
    overrides += [*COMMON, "logging.tensorboard=true"]
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    run_ranks(4, run, path, [*overrides, *layout_settings((2, 1, 2)), f"train.output_dir={straight}"])
    for step in (2, 3):
        shutil.copytree(straight / f"checkpoints/step_0000000{step}", cut / f"checkpoints/step_0000000{step}")
    damaged = cut / "checkpoints/step_00000003/rank_00003.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "megatron_ral.train",
            "--config",
            path,
            "--resume",
            *overrides,
            *layout_settings((1, 2, 1)),
            f"train.output_dir={cut}",
        ],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"resumed from {cut}/checkpoints/step_00000002: 2 of 4 steps done" in result.stdout
    [warning] = [line for line in result.stderr.splitlines() if "passed over" in line]
    assert "step_00000003' is passed over: file 'rank_00003.safetensors' has" in warning
    check_like_straight(straight, cut)
    assert [folder.name for folder in whole_checkpoints(str(cut))] == [f"step_0000000{step}" for step in (2, 3, 4)]


class Disk:
    """A replacement of this process's fsync that waits until released, and fails when broken."""

    def __init__(self):
        self.released, self.broken, self._fsync = threading.Event(), False, os.fsync
        self.released.set()
        os.fsync = self

    def __call__(self, handle: int) -> None:
        self.released.wait()
        if self.broken:
            raise OSError(28, "No space left on device")
        self._fsync(handle)


def saves(path: str, overrides: list[str], output: str) -> dict:
    """Save on two ranks whose disks are slow or full in turn."""
    trainer, disk, seen = open_trainer(path, overrides, False), Disk(), {}
    policy, rank, checkpoints = trainer.policy, trainer.layout.rank, trainer.checkpoints

    def state() -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in policy.state()}

    def whole() -> list[str]:
        return together(lambda: [folder.name for folder in whole_checkpoints(output)])

    def names() -> list[str]:
        return together(lambda: sorted(entry.name for entry in Path(output, "checkpoints").iterdir()))

    def together(look):
        barrier()  # no rank goes on while another looks
        found = look()
        barrier()
        return found

    checkpoints.save(1, wait=True)
    if rank == 1:
        disk.released.clear()
    before = state()
    checkpoints.save(2)
    for _, value in policy.state():  # a step would change it too, while nothing is written yet
        value.add_(1.0)
    checkpoints.poll()
    seen["while one rank writes"] = whole()
    disk.released.set()
    checkpoints.finish()
    seen["when all have"] = whole()
    file = load_file(f"{output}/checkpoints/step_00000002/rank_{rank:05d}.safetensors")
    seen["saved is what was"] = file.keys() == before.keys() and all(
        torch.equal(file[name], value) for name, value in before.items()
    )
    checkpoints.save(3)
    while whole() != ["step_00000002", "step_00000003"]:  # keep_checkpoints: 2
        checkpoints.poll()
    disk.broken = rank == 1
    try:
        checkpoints.save(4)
        checkpoints.finish()
    except AgreedError as error:
        seen["full disk"] = str(error)
    seen["after a failed save"] = whole(), names()
    disk.broken = False
    random.seed(rank), np.random.seed(rank), torch.manual_seed(rank)
    checkpoints.save(5, wait=True)
    draws = random.random(), np.random.rand(), float(torch.rand(()))
    checkpoints.save(5)  # asked for twice, by the interval and by a signal
    seen["in the end"] = names()
    stop_groups()
    return {**seen, "draws": draws}


def draws_after_restore(path: str, overrides: list[str]) -> tuple:
    trainer = open_trainer(path, overrides, True)
    restore(trainer)
    drawn = random.random(), np.random.rand(), float(torch.rand(()))
    stop_groups()
    return drawn


def test_saves_in_a_thread(material, trained_model, tmp_path):
    path, overrides = write_config(tmp_path, RL, trained_model, material["data"], "rl")
    output = tmp_path / "run"
    overrides += [f"train.output_dir={output}"]
    results = run_ranks(2, saves, path, overrides, str(output))
    for seen in results:
        assert seen["while one rank writes"] == ["step_00000001"]
        assert seen["when all have"] == ["step_00000001", "step_00000002"]
        assert seen["saved is what was"]
        assert "rank 1: '" in seen["full disk"] and "step_00000004' could not be written" in seen["full disk"]
        assert "No space left on device" in seen["full disk"]
        assert seen["after a failed save"] == (
            ["step_00000002", "step_00000003"],
            ["latest", "step_00000002", "step_00000003", "step_00000004.partial"],
        )
        assert seen["in the end"] == ["latest", "step_00000003", "step_00000005"]
    # the global random generators, because a user's own reward function may draw from them
    drawn = run_ranks(2, draws_after_restore, path, overrides)
    assert drawn == [seen["draws"] for seen in results] and drawn[0] != drawn[1]


def agreed(path: str, overrides: list[str], outputs: list[str]) -> str:
    """Return the checkpoint, or the error, that ranks agree on which see different folders."""
    process_groups = start_groups(tensor_size=1, pipeline_size=1, seed=0)
    config = load_config(path, [*overrides, f"train.output_dir={outputs[process_groups.layout.rank]}"])
    settings = CheckpointSettings.from_config(config)
    try:
        return str(agree_on_checkpoint(settings, find_checkpoint(settings, True)))
    except AgreedError as error:
        return str(error)
    finally:
        stop_groups()


def test_ranks_agree_on_a_checkpoint_or_say_that_they_cannot(material, trained_model, tmp_path):
    path, overrides = write_config(tmp_path, SFT, trained_model, material["data"])
    overrides += ["train.num_steps=3", "train.keep_checkpoints=3"]
    run_ranks(1, run, path, [*overrides, f"train.output_dir={tmp_path}/all"])
    steps = {"all": (1, 2, 3), "behind": (1, 2), "none": ()}
    for name, kept in steps.items():
        for step in kept if name != "all" else ():
            shutil.copytree(
                tmp_path / "all" / "checkpoints" / f"step_0000000{step}",
                tmp_path / name / "checkpoints" / f"step_0000000{step}",
            )
    folders = {name: str(tmp_path / name) for name in steps}
    results = run_ranks(2, agreed, path, overrides, [folders["all"], folders["behind"]])
    assert results == [f"{folders[name]}/checkpoints/step_00000002" for name in ("all", "behind")]
    results = run_ranks(2, agreed, path, overrides, [folders["all"], folders["none"]])
    assert all("rank 1 sees none of" in text and "file system that all nodes share" in text for text in results)
    assert newest_checkpoint(folders["none"]) is None
    assert dataclasses.asdict(read_manifest(tmp_path / "all/checkpoints/step_00000003"))["world_size"] == 1
