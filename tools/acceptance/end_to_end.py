"""The whole pipeline on one rank: `launch_scripts/ral_tiny.sh` with both tasks, shortened, side by side.

Shards, SFT, evaluation, RL, evaluation and export. On a GPU the rank uses NCCL and bfloat16.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import torch

from megatron_ral.demo.runs import curve
from tools.acceptance.part import PROJECT, Figure, Setting, expect, note

TASKS = ("digit-search", "video-search")
COUNTS = {"single": 48, "search": 64, "biased": 64, "rl": 64, "heldout": 32}
SHORT = [
    "logging.num_eval_prompts=16",
    "logging.eval_interval=0",
    "logging.probe_interval=0",
    "train.checkpoint_interval=0",
    "sft:train.num_steps=6",
    "sft:train.batch_size=16",
    "sft:data.train.0.num_samples=32",
    "sft:data.train.1.num_samples=32",
    "sft:data.train.2.num_samples=32",
    "rl:train.num_steps=3",
    "rl:rollout.num_prompts=8",
    "rl:rollout.num_minibatches=2",
    "rl:train.micro_batch_size=2",
]


def command(dtype: str) -> list[str]:
    """Return the command of the pipeline. The task and its folders are in the environment."""
    return ["bash", "launch_scripts/ral_tiny.sh", f"model.dtype={dtype}", *SHORT]


def begin(setting: Setting, task: str) -> subprocess.Popen:
    """Make the data of a task and start its pipeline."""
    folder = setting.folder / task
    folder.mkdir(parents=True, exist_ok=True)
    tool = f"tools/make_{task.replace('-', '_')}.py"
    options = [text for name, count in COUNTS.items() for text in (f"--num-{name}", str(count))]
    data = [sys.executable, tool, "--output", str(folder / "data"), *options]
    pipeline = " ".join(command("bfloat16" if setting.on_gpu else "float32"))
    environment = {
        **os.environ,
        "TASK": task,
        "OUTPUT_DIR": str(folder / "run"),
        "DATA_DIR": str(folder / "data"),
        "NPROC_PER_NODE": "1",
        "MEGATRON_RAL_PYTHON": sys.executable,
    }
    with open(setting.folder / f"{task}.log", "w", encoding="utf-8") as log:
        return subprocess.Popen(
            ["bash", "-c", f'[ -f "$DATA_DIR/dataset_info.json" ] || "$0" "$@"; exec {pipeline}', *data],
            cwd=PROJECT,
            env=environment,
            stdout=log,
            stderr=log,
        )


def loads(folder: Path, setting: Setting) -> str:
    """Load an exported folder with transformers and run it; returns "finite" or what is wrong."""
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model.to(setting.device)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 9, device=setting.device)[None]).logits
    return "finite" if bool(logits.isfinite().all()) else "logits are not finite"


def run(setting: Setting) -> Iterator[Figure]:
    """Yield losses, evaluation and seconds of both tasks."""
    has_video = importlib.util.find_spec("av") is not None
    yield note("tasks", ", ".join(TASKS if has_video else TASKS[:1]), "", "" if has_video else "no PyAV, no videos")
    running = {task: begin(setting, task) for task in (TASKS if has_video else TASKS[:1])}
    for task, process in running.items():
        status = process.wait()
        yield expect(f"{task}: exit status", status, status == 0, f"0; see {task}.log")
        if status:
            continue
        output = setting.folder / task / "run"
        for name, tag in (("sft", "loss"), ("rl", "loss/token")):
            losses, norms = ([value for _, value in curve(output / name, logged)] for logged in (tag, "grad_norm"))
            finite = bool(losses) and all(map(math.isfinite, [*losses, *norms]))
            yield expect(
                f"{task}, {name}: losses",
                f"{losses[0]:.4f} to {losses[-1]:.4f}" if losses else "none",
                finite,
                "finite",
            )
        evaluation = json.loads((output / "rl" / "evaluation.json").read_text(encoding="utf-8"))
        yield note(f"{task}: accuracy", evaluation["accuracy"], "", "not trained to be any good")
        result = loads(output / "rl" / "hf", setting)
        yield expect(f"{task}: exported folder", result, result == "finite", "loads, finite logits")
        seconds = {file.name: file.read_text().strip() for file in sorted((output / "seconds").iterdir())}
        yield note(f"{task}: seconds", ", ".join(f"{name} {value}" for name, value in seconds.items()))
