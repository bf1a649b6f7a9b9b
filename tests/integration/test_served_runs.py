"""A whole run whose responses come from a server (stock transformers in the place of vLLM): as native, and resumed."""

import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed.runner import run_ranks
from tests.integration.cases import RL, run_training, write_config
from tests.integration.test_runs import exported

ENGINE = Path(__file__).parents[1] / "stock_engine.py"
SHORT = [
    "train.num_steps=3",
    "logging={eval_interval: 0, probe_interval: 0, completions_interval: 0, gradient_ratio_interval: 0}",
    "data.eval_shards=''",
    "loss.sampler_correction=token_truncate",
]


@pytest.fixture
def served(tmp_path) -> list[str]:
    """Settings of a run with a server: an interpreter that starts another engine than the one for vLLM."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/usr/bin/env bash
arguments=("$@")
for index in "${{!arguments[@]}}"; do
    [ "${{arguments[index]}}" != --engine ] || arguments[index + 1]={ENGINE}
done
exec {sys.executable} "${{arguments[@]}}"
"""
    )
    python.chmod(0o755)
    return ["rollout.sampler=vllm", f"rollout.vllm={{python: {python}, probe_bound: 1.0e-4, bucket_mib: 1}}"]


def logged(folder: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


def test_a_run_with_a_server_is_the_native_run_and_resumes_bit_for_bit(material, trained_model, tmp_path, served):
    """Three rollouts, the first of them on two ranks that each have a server. Float32: the engines differ by rounding,
    which the weights multiply from update to update."""
    path, overrides = write_config(tmp_path, RL, trained_model, material["data"], "rl")
    overrides = [*overrides, *SHORT]
    for name, settings in (("native", []), ("straight", served), ("cut", [*served, "train.stop_after_step=1"])):
        run_ranks(2, run_training, path, [*overrides, *settings, f"train.output_dir={tmp_path}/{name}"])
    run_ranks(2, run_training, path, [*overrides, *served, f"train.output_dir={tmp_path}/cut"], True)
    for tag in ("reward", "completions/mean_length"):
        assert logged(tmp_path / "straight", tag)[0] == logged(tmp_path / "native", tag)[0]
    assert 0 < max(logged(tmp_path / "straight", "sampling/logprob_difference")) < 1e-5
    assert max(abs(1 - ratio) for ratio in logged(tmp_path / "straight", "sampling/ratio_mean")) < 1e-4
    native, straight, resumed = (exported(tmp_path / name) for name in ("native", "straight", "cut"))
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    start = exported_start(trained_model)
    moved = {name: float((value - start[name]).norm()) for name, value in native.items()}
    apart = {name: float((straight[name] - value).norm()) for name, value in native.items()}
    assert sum(moved.values()) > 1e-2 and sum(apart.values()) < 0.1 * sum(moved.values())
    assert sorted(file.name for file in (tmp_path / "straight" / "sampler").iterdir()) == ["rank_0.log", "rank_1.log"]


def test_a_run_ahead_with_a_server_is_the_native_run_ahead_and_resumes_bit_for_bit(
    material, trained_model, tmp_path, served
):
    """Four rollouts. The first two are sampled with the weights that the run starts with, by any sampler."""
    path, overrides = write_config(tmp_path, RL, trained_model, material["data"], "rl")
    overrides = [*overrides, *SHORT[1:3], "rollout.overlap=true", "rollout.refill_rounds=1"]
    for name, settings in (("native", []), ("straight", served), ("cut", [*served, "train.stop_after_step=2"])):
        run_ranks(2, run_training, path, [*overrides, *settings, f"train.output_dir={tmp_path}/{name}"])
    held = tmp_path / "cut" / "checkpoints" / "step_00000002"
    assert sorted(file.name for file in held.glob("rollout_*")) == [
        f"rollout_0000{rank}.{kind}" for rank in (0, 1) for kind in ("json", "safetensors")
    ]
    run_ranks(2, run_training, path, [*overrides, *served, f"train.output_dir={tmp_path}/cut"], True)
    for tag in ("reward", "completions/mean_length", "refill/num_prompts", "refill/reward"):
        native, straight, resumed = (logged(tmp_path / name, tag) for name in ("native", "straight", "cut"))
        assert len(straight) == 4 and straight[:2] == native[:2] and resumed == straight, tag
    for name in ("native", "straight", "cut"):
        assert logged(tmp_path / name, "sampling/staleness") == [0.0, 2.0, 2.0, 2.0]
        assert 1e-4 > logged(tmp_path / name, "sampling/ratio_max")[0] - 1 > -1e-4
        assert min(logged(tmp_path / name, "sampling/ratio_max")[1:]) > 1.001
    native, straight, resumed = (exported(tmp_path / name) for name in ("native", "straight", "cut"))
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    start = exported_start(trained_model)
    moved = sum(float((value - start[name]).norm()) for name, value in native.items())
    apart = sum(float((straight[name] - value).norm()) for name, value in native.items())
    assert moved > 1e-2 and apart < 0.1 * moved
    assert not list((tmp_path / "straight" / "checkpoints" / "step_00000004").glob("rollout_*")), "nothing follows"


def exported_start(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: value for file in Path(folder).glob("*.safetensors") for name, value in load_file(file).items()}
