"""The launch scripts: they read well, resolve their runs, and two nodes of one job start, lose one, and go on."""

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.tiers import chosen

PROJECT = Path(__file__).resolve().parents[2]
SCRIPTS = PROJECT / "launch_scripts"
SOURCES = (SCRIPTS.glob("*.sh"), SCRIPTS.glob("*.sbatch"), (PROJECT / "tools").glob("*.sh"))
ALL = sorted([*(path for paths in SOURCES for path in paths), *(PROJECT / "tests").rglob("*.sh")])
RUNS = {
    "sft_7b": 8,
    "grpo_7b": 8,
    "ral_7b": 8,
    "ral_7b_lora": 8,
    "ral_zero_7b": 8,
    "ral_explored_7b": 8,
    "ral_qwen3vl_4b": 8,
    "ral_qwen3vl_8b": 8,
    "ral_qwen3_5_9b": 8,
    "distill_32b_to_7b": 8,
    "ral_32b": 32,
    "ral_70b": 64,
    "ral_explored_70b": 64,
}
SHELLCHECK = shutil.which("shellcheck") or next(iter(map(str, (PROJECT / ".venv" / "bin").glob("shellcheck"))), None)

TINY = [
    "model.dtype=float32",
    "data.max_prompt_length=128",
    "data.prompt_suffix=''",
    "rollout.num_prompts=4",
    "rollout.group_size=2",
    "rollout.num_minibatches=2",
    "rollout.max_response_length=4",
    "train.num_steps=2",
    "train.checkpoint_interval=1",
    "optimizer.warmup_steps=0",
    "logging.probe_interval=0",
    "logging.tensorboard=false",
    "logging.gradient_ratio_interval=0",
]


def environment(**values: object) -> dict[str, str]:
    keep = {
        name: value
        for name, value in os.environ.items()
        if name
        not in ("RANK", "WORLD_SIZE", "NNODES", "NODE_RANK", "MODEL_DIR", "TRAIN_SHARDS", "OUTPUT_DIR", "TEACHER_DIR")
    }
    return {**keep, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in values.items()}}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_script_reads_well(path):
    parsed = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr
    if SHELLCHECK is None:
        pytest.skip("shellcheck is not installed; only bash -n was run")
    checked = subprocess.run([SHELLCHECK, "-x", str(path)], capture_output=True, text=True, cwd=PROJECT)
    assert checked.returncode == 0, checked.stdout


def check_settings(config, name: str) -> None:
    """Check what the name of a run promises."""
    assert (config.train.algorithm == "sft") == (name == "sft_7b")
    assert name == "sft_7b" or config.attention_acts == name.startswith("ral")
    assert config.reward.require_think == config.data.include_process == (name != "ral_zero_7b")
    assert ("<think>" in config.data.prompt_suffix) == (name != "ral_zero_7b")
    assert (config.rollout.attention_noise.sigma > 0) == ("explored" in name)
    assert (config.loss.attention_target == "contrast") == ("explored" in name)
    rates = {"sft_7b": 5e-6, "ral_7b_lora": 1e-4}
    assert config.optimizer.learning_rate == rates.get(name, 1e-5)
    assert (config.adapter.rank > 0) == name.endswith("lora")


@pytest.mark.parametrize("name", RUNS)
def test_run_is_what_its_name_says(name):
    from megatron_ral.config import load_config

    check_settings(load_config(PROJECT / f"pretrained_configs/runs/{name}.yaml", ["model.path=x"]), name)


@pytest.mark.parametrize("name", chosen(list(RUNS), ["sft_7b", "distill_32b_to_7b", "ral_qwen3vl_4b", "ral_70b"]))
def test_dry_run(name, tmp_path):
    from megatron_ral.config import load_config

    done = subprocess.run(
        ["bash", str(SCRIPTS / f"{name}.sh"), "--dry-run", "seed=77"],
        capture_output=True,
        text=True,
        env=environment(OUTPUT_DIR=tmp_path / "never"),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(done.stdout.split("\n\n")[0])
    config = load_config(resolved)
    assert config.seed == 77 and f"{RUNS[name]} ranks" in done.stdout, done.stdout
    check_settings(config, name)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    "arguments, variables, said",
    [
        (["nothing"], {}, ["NAME = 'nothing' is not a run", "ral_7b"]),
        ([], {}, ["NAME = '' is not a run"]),
        (["ral_7b"], {}, ["set MODEL_DIR", "TRAIN_SHARDS"]),
        (["distill_32b_to_7b"], {"MODEL_DIR": "m", "TRAIN_SHARDS": "t"}, ["set TEACHER_DIR"]),
    ],
)
def test_run_says_what_is_missing(arguments, variables, said):
    done = subprocess.run(
        ["bash", str(SCRIPTS / "run.sh"), *arguments],
        capture_output=True,
        text=True,
        env=environment(**variables),
        timeout=120,
    )
    assert done.returncode == 2 and all(part in done.stderr for part in ["error: ", *said]), done.stderr


def test_grpo_and_zero_differ_from_ral_in_nothing_else():
    from megatron_ral.config import flat_settings, load_config

    ral, grpo, zero = (
        flat_settings(load_config(PROJECT / f"pretrained_configs/runs/{name}.yaml", ["model.path=x"]))
        for name in ("ral_7b", "grpo_7b", "ral_zero_7b")
    )
    assert {key for key in ral if ral[key] != grpo[key]} == {"loss.attention_coef"}
    assert {key for key in ral if ral[key] != zero[key]} == {
        "reward.require_think",
        "data.include_process",
        "data.prompt_suffix",
    }


def test_short_comparison_of_explored_attention_in_miniature(tmp_path):
    """One step of every lesson and one rollout of both arms: the phases run once and end with a table and a picture."""
    sizes = ["--lessons", "1", "1", "1", "--num-rollouts", "1", "--num-prompts", "4", "--processes", "1"]
    for phases_run in (True, False):
        done = subprocess.run(
            ["bash", str(SCRIPTS / "explore_tiny.sh"), *sizes],
            capture_output=True,
            text=True,
            env=environment(OUTPUT_DIR=tmp_path / "out", SEED=7),
            timeout=1800,
        )
        assert done.returncode == 0, done.stderr
        assert "start + 1 rollouts of contrast" in done.stdout and "Contrast is NOT ahead of GRPO" in done.stdout
        report = json.loads((tmp_path / "out" / "seed_7" / "report.json").read_text())
        assert report["seed"] == 7 and set(report["rows"]) == {"searcher", "start", "grpo", "contrast"}
        assert [step for step, _ in report["curves"]["contrast"]] == [0, 1]
        assert (tmp_path / "out" / "seed_7" / "explored.png").stat().st_size > 10_000
        assert phases_run == (report["seconds"]["arms"] > 5), report["seconds"]


class Node:
    """One node of a job: ral_70b.sh in a session of its own."""

    def __init__(self, number: int, port: int, folder: Path, material: dict, *settings: str):
        self.log = folder / f"node_{number}.log"
        self.process = subprocess.Popen(
            ["bash", str(SCRIPTS / "ral_70b.sh"), *TINY, *settings],
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment(
                NNODES=2,
                NPROC_PER_NODE=2,
                NODE_RANK=number,
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                MODEL_DIR=material["tiny"],
                TRAIN_SHARDS=f"{material['data']}/rl-*.tar",
                OUTPUT_DIR=folder / "run",
            ),
        )

    def text(self) -> str:
        return self.log.read_text()

    def kill(self) -> None:
        """As when a node is switched off: nothing on it gets to say a word."""
        if self.process.poll() is None:  # ranks are in sessions of their own
            for process in [
                *psutil.Process(self.process.pid).children(recursive=True),
                psutil.Process(self.process.pid),
            ]:
                process.kill()


@pytest.fixture
def nodes():
    started: list[Node] = []
    yield started
    for node in started:
        node.kill()
        node.process.wait()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_two_nodes_lose_one_and_go_on(material, tmp_path, nodes):
    from megatron_ral.training.checkpoint.files import whole_checkpoints

    layout = ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2")
    layout += ("watchdog.timeout_seconds=10", "train.num_steps=200")
    port = free_port()
    nodes += [Node(number, port, tmp_path, material, *layout) for number in (0, 1)]
    deadline = time.monotonic() + 300
    while not whole_checkpoints(str(tmp_path / "run")):
        assert time.monotonic() < deadline and nodes[0].process.poll() is None, nodes[0].text()
        time.sleep(0.1)
    nodes[1].kill()
    assert nodes[0].process.wait(timeout=120) != 0
    text = nodes[0].text()
    assert "preflight: 4 ranks agree" in text and "watchdog: rank" in text and "--resume" in text, text

    done = int(whole_checkpoints(str(tmp_path / "run"))[-1].name[5:13])  # step_00000001, or that with .partial
    port = free_port()
    again = [Node(number, port, tmp_path, material, *layout, f"train.stop_after_step={done + 2}") for number in (0, 1)]
    nodes += again
    assert [node.process.wait(timeout=300) for node in again] == [0, 0], again[0].text()
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert done == summary["first_step"] < summary["last_step"] == summary["end_step"] == done + 2
    assert "resumed from" in again[0].text()


def fake_slurm(folder: Path) -> Path:
    """The three commands of Slurm that the job file calls, for a job of one node; what is requeued is written down."""
    programs = {
        "scontrol": f'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "{folder}/requeued"; fi',
        "squeue": f'[ -f "{folder}/busy" ] || {{ touch "{folder}/busy"; exit 1; }}; cat "{folder}/left"',
        "srun": 'while [[ "$1" = --* ]]; do shift; done; SLURM_NODEID=0 exec "$@"',
    }
    (folder / "bin").mkdir()
    (folder / "left").write_text("1-00:05:30\n")
    for name, text in programs.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    return folder / "bin"


def test_slurm_job_stops_is_queued_again_and_ends(material, tmp_path):
    values = environment(
        PATH=f"{fake_slurm(tmp_path)}:{os.environ['PATH']}",
        SLURM_SUBMIT_DIR=PROJECT,
        SLURM_JOB_ID=4711,
        SLURM_JOB_NUM_NODES=1,
        SLURM_JOB_NODELIST="node[1]",
        NPROC_PER_NODE=1,
        MASTER_PORT=free_port(),
        MODEL_DIR=material["tiny"],
        TRAIN_SHARDS=f"{material['data']}/rl-*.tar",
        OUTPUT_DIR=tmp_path / "run",
        SQUEUE_PAUSE=0,
    )
    values.pop("NNODES", None)
    (tmp_path / "asks.py").write_text(
        "import os, signal\n"
        "def once(completion, solution, problem_type):\n"
        f"    if not os.path.exists('{tmp_path}/asked'):\n"
        f"        open('{tmp_path}/asked', 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    return float(len(completion) % 2)\n"
    )
    values["PYTHONPATH"] = str(tmp_path)
    settings = [
        *TINY,
        "reward.functions={asks: {path: 'asks:once', weight: 1.0}}",
        "train.num_steps=3",
        "parallel.tensor_model_parallel_size=1",
        "parallel.sequence_parallel=false",
    ]

    def job(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(SCRIPTS / "slurm.sbatch"), "ral_7b", *settings, *more],
            capture_output=True,
            text=True,
            env=values,
            timeout=200,
        )

    (tmp_path / "left").write_text("INVALID\n")
    unknown = job()
    assert unknown.returncode == 1 and "squeue does not say how long" in unknown.stderr, unknown.stderr
    (tmp_path / "left").write_text("1-00:05:30\n")
    first = job("train.time_limit_minutes=0.0001")
    assert first.returncode == 1 and "no step was made" in first.stderr, first.stderr
    assert not (tmp_path / "requeued").exists()
    cut = job()
    assert cut.returncode == 0 and "1 of 3 steps are done" in cut.stdout, cut.stdout + cut.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    values["MASTER_PORT"] = str(free_port())
    last = job()
    assert last.returncode == 0 and "at its end: 3 of 3" in last.stdout, last.stdout + last.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    resolved = (tmp_path / "run/checkpoints/step_00000003/config.yaml").read_text()
    assert "time_limit_minutes: 1425" in resolved, "1-00:05:30 less 20 minutes"
