"""Many training runs for one question: started side by side, each once, and read back from their event files.

Shared by `tools/explore_tiny.py` and the studies `tools/study.py`, `tools/study_explored.py` and
`tools/distill_study.py`.
"""

import hashlib
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Callable, Sequence

PROJECT = Path(__file__).resolve().parents[2]


def beside(folder: Path, ending: str) -> Path:
    """Return a file beside a run's folder, whose name may hold a dot, so that `with_suffix` would cut it."""
    return folder.with_name(folder.name + ending)


def call(log: Path, *arguments: object) -> float:
    """Run a command of the project with one thread and return its processor seconds; its output goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(PROJECT)}
    with open(log, "a") as stream:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=PROJECT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"a run failed (exit {process.returncode}); its output is in {log}")
    return used.ru_utime + used.ru_stime


def train_once(config: str, model: Path, target: Path, seed: int, settings: Sequence[str], processes: int = 1) -> float:
    """Train, unless that is done already, and return the processor seconds that it took now.

    Args:
        config: name of a file in pretrained_configs/runs.
        target: output folder. The rest of an interrupted run is deleted there; a finished run with other settings is
            refused.
        processes: data-parallel processes.
    """
    made_with, file = beside(target, ".settings"), PROJECT / "pretrained_configs" / "runs" / f"{config}.yaml"
    inputs = [f"{config}.yaml {hashlib.sha256(file.read_bytes()).hexdigest()}", str(model), str(seed), *settings]
    if (target / "hf").is_dir():
        if made_with.read_text().split("\n") != inputs:
            raise SystemExit(f"{target} was made with other settings; give another --output-dir or remove it")
        return 0.0
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    made_with.write_text("\n".join(inputs))
    seconds = call(
        beside(target, ".log"),
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        processes,
        "-m",
        "megatron_ral.train",
        "--config",
        file,
        f"model.path='{model}'",
        f"train.output_dir='{target}'",
        f"seed={seed}",
        "logging.probe_interval=0",
        "train.checkpoint_interval=0",
        *settings,
    )
    shutil.rmtree(target / "checkpoints", ignore_errors=True)
    return seconds


def side_by_side(what: str, work: Callable[..., None], tasks: Sequence[tuple], jobs: int) -> None:
    """Call work(*task) for all tasks, `jobs` at a time, with a progress bar. The first failure ends it."""
    from tqdm import tqdm

    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(tasks), desc=what) as bar:
        try:
            for future in as_completed([pool.submit(work, *task) for task in tasks]):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def curve(run: Path, tag: str) -> list[tuple[int, float]]:
    """Return the (step, value) pairs of a scalar of one run; empty where it was not logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def draw_curves(axis, curves: Sequence[Sequence[tuple[int, float]]], **style: object) -> None:
    """Draw the mean over runs of curves with the same steps, and its standard error as a band."""
    steps = [step for step, _ in curves[0]]
    means, errors = zip(
        *(mean_and_error(column) for column in zip(*([value for _, value in curve] for curve in curves)))
    )
    [line] = axis.plot(steps, means, **style)
    low, high = ([mean + sign * error for mean, error in zip(means, errors)] for sign in (-1, 1))
    axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.08)
