"""A signal to one rank and the time limit end a run at the next step with a checkpoint; a resumed run is exact."""

import torch
from safetensors.torch import load_file

from tests.faults.launch import run_job
from tests.integration.cases import RL, write_config


def test_sigterm_to_one_rank_checkpoints_and_resume_is_exact(material, tmp_path):
    path, overrides = write_config(tmp_path, RL, material["tiny"], material["data"], "rl")
    common = [
        "--config",
        path,
        *overrides,
        "logging.probe_interval=0",
        "logging.eval_interval=0",
        "train.num_steps=3",
        "train.checkpoint_interval=0",
        "reward.functions={varied: {path: 'tests.faults.doom:varied', weight: 1.0}}",
    ]
    straight = run_job(2, tmp_path / "a", [*common, f"train.output_dir={tmp_path}/straight"])
    asked = run_job(
        2,
        tmp_path / "b",
        [*common, f"train.output_dir={tmp_path}/cut"],
        {"rank": 1, "phase": "rollout", "entry": 2, "delay": 0.0, "how": "ask"},
    )
    assert straight.codes == asked.codes == [0, 0], asked.output
    assert "SIGTERM was received: stopped after step 2 of 3" in asked.output[0] and "--resume" in asked.output[0]
    assert not (tmp_path / "cut/hf").exists()
    assert [path.name for path in sorted((tmp_path / "cut/checkpoints").glob("step_*"))] == ["step_00000002"]
    again = run_job(2, tmp_path / "c", [*common, f"train.output_dir={tmp_path}/cut", "--resume"])
    assert again.codes == [0, 0], again.output
    for file in (tmp_path / "straight/hf").glob("*.safetensors"):
        wanted, found = load_file(file), load_file(tmp_path / "cut/hf" / file.name)
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_time_limit_that_is_over_before_the_first_step(material, tmp_path):
    path, overrides = write_config(tmp_path, RL, material["tiny"], material["data"], "rl")
    ended = run_job(
        1,
        tmp_path / "job",
        [
            "--config",
            path,
            *overrides,
            "logging.probe_interval=0",
            "logging.eval_interval=0",
            "train.time_limit_minutes=0.0001",
            f"train.output_dir={tmp_path}/run",
        ],
    )
    assert ended.codes == [0], ended.output
    assert "train.time_limit_minutes = 0.0001 have passed: stopped after step 0 of 4" in ended.output[0]
    assert not (tmp_path / "run/checkpoints").exists() and not (tmp_path / "run/hf").exists()
