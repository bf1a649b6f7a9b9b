"""Time from a command to the first step of a tiny model, beside that of importing the libraries alone.

    python -m tools.benchmarks.start_up [--rounds 3] [--processes 2] [--folder DIR]

A tiny model and its data are made first, and everything runs once without being counted, so that files were read
before. Then each round measures, one after the other:

    libraries    a process that imports torch, transformers, megatron-core and DeepSpeed, and ends
    one process  python -m megatron_ral.train, until its bar of steps appears
    torchrun     the same in --processes processes, started by torchrun

Printed are the seconds of the clock of every round, and the processor seconds of all processes. The last lines are
`ratio start_up VALUE` and `ratio start_up_torchrun VALUE`: the shortest time over the shortest of the libraries.
"""

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
LIBRARIES = [sys.executable, "-W", "ignore", "-c", "import torch, transformers, megatron.core, deepspeed"]


def train_command(material: tuple[str, str, str], output: Path, processes: int) -> list[str]:
    """Return the command of one step of GRPO with the attention term; `processes` 0 starts none by torchrun."""
    model, _, data = material
    start = ["torch.distributed.run", f"--nproc-per-node={processes}", "-m"] if processes else []
    settings = {
        "model.path": model,
        "data.train": f"[{{shards: '{data}/rl-*.tar'}}]",
        "data.eval_shards": f"'{data}/heldout-*.tar'",
        "logging.eval_interval": 0,
        "logging.probe_interval": 0,
        "train.num_steps": 1,
        "train.output_dir": output,
    }
    config = PROJECT / "pretrained_configs" / "runs" / "ral_tiny.yaml"
    values = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", *start, "megatron_ral.train", "--config", str(config), *values]


def measure(command: list[str], until: bytes = b"") -> tuple[float, float]:
    """Run a command to its end.

    Args:
        until: output at which the clock stops. Empty: the end of the command.

    Returns:
        Seconds of the clock, and processor seconds of all processes up to the end.

    Raises:
        SystemExit: the command failed, or never printed `until`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(PROJECT)}
    before, started, seconds, output = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0.0, b""
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        while part := os.read(process.stdout.fileno(), 65536):
            output += part
            if until and not seconds and until in output:
                seconds = time.perf_counter() - started
    seconds = seconds or (0.0 if until else time.perf_counter() - started)
    if process.returncode or not seconds:
        raise SystemExit(f"{' '.join(command)} failed:\n{output.decode(errors='replace')[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    """Measure the sides in turns and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where inputs and outputs go (default: a temporary folder)")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        from tools.benchmarks.tiny_material import make_tiny_material

        material = make_tiny_material(folder)
        rounds: dict[str, list[tuple[float, float]]] = {"libraries": [], "one process": [], "torchrun": []}
        for number in range(arguments.rounds + 1):
            one = train_command(material, folder / f"one_{number}", 0)
            many = train_command(material, folder / f"many_{number}", arguments.processes)
            sides = measure(LIBRARIES), measure(one, b"| 0/1 ["), measure(many, b"| 0/1 [")
            if number:
                for figures, side in zip(rounds.values(), sides, strict=True):
                    figures.append(side)
    print(f"{'':12}{'seconds of each round':28}processor seconds")
    for name, figures in rounds.items():
        clock, processor = ("  ".join(f"{value:5.1f}" for value in column) for column in zip(*figures, strict=True))
        print(f"{name:12}{clock:28}{processor}")
    shortest = {name: min(seconds for seconds, _ in figures) for name, figures in rounds.items()}
    print(f"ratio start_up {shortest['one process'] / shortest['libraries']:.2f}")
    print(f"ratio start_up_torchrun {shortest['torchrun'] / shortest['libraries']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
