"""Training step of this tree against one of an earlier revision, on one machine.

    bash launch_scripts/ral_tiny.sh
    python -m tools.benchmarks.before_after REVISION [--run outputs/ral_tiny] [--rounds 6] [--steps 10] [SETTING ...]

The RL steps of a finished tiny run start from its weights after SFT, with one thread per tree. REVISION is checked out
to a temporary folder and must have `tools/benchmarks/profile_step.py`. In each round both trees run at once, each on a
processor of its own. They swap processors every round, so that other work on the machine affects both alike. Seconds
are medians over rounds. Other data: `data.train="[{shards: DIR/*.tar}]"`. The last line is `ratio before_after VALUE`:
seconds of a step now over those before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

PROJECT = Path(__file__).resolve().parents[2]
TURN = """
import json, os, sys, tempfile
from pathlib import Path
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
import torch
torch.set_num_threads(1)
import megatron_ral
from tools.benchmarks import profile_step
assert Path(megatron_ral.__file__).is_relative_to(sys.argv[1])
count = int(sys.argv[3])
with tempfile.TemporaryDirectory() as folder:
    trainer = profile_step.make_trainer(Path(sys.argv[2]), folder, sys.argv[4:])
    profile_step.steps(trainer, 0, 1)
    phases, _ = profile_step.steps(trainer, 1, count)
print(json.dumps(phases))
"""


def together(trees: list[Path], processors: list[int], arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Return the wall seconds by phase of one step in each tree."""
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                TURN,
                str(tree),
                str(arguments.run.resolve()),
                str(arguments.steps),
                *arguments.settings,
            ],
            cwd=tree,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)},
            preexec_fn=lambda processor=processor: os.sched_setaffinity(0, {processor}),
        )
        for tree, processor in zip(trees, processors)
    ]
    results = [process.communicate() for process in started]
    for tree, process, (_, errors) in zip(trees, started, results):
        if process.returncode:
            raise SystemExit(f"error: a step in {tree} failed:\n{errors[-2000:]}")
    return [json.loads(output.splitlines()[-1]) for output, _ in results]


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("revision", help="revision of this repository")
    parser.add_argument(
        "--run", type=Path, default=PROJECT / "outputs" / "ral_tiny", help="folder of a finished tiny run"
    )
    parser.add_argument("--rounds", type=int, default=6, help="measurements; the median counts")
    parser.add_argument("--steps", type=int, default=10, help="steps of one measurement")
    parser.add_argument("settings", nargs="*", metavar="dotted.key=value", help="settings that replace the run's")
    arguments = parser.parse_intermixed_args()
    processors = sorted(os.sched_getaffinity(0))[:2]
    if len(processors) < 2:
        parser.error("two processors are needed")
    git = ["git", "-C", str(PROJECT)]
    subject = subprocess.run([*git, "log", "-1", "--format=%h %s", arguments.revision], capture_output=True, text=True)
    if subject.returncode:
        parser.error(f"REVISION = '{arguments.revision}' is no revision of {PROJECT}")
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder).resolve() / "before"
        subprocess.run([*git, "worktree", "add", "--detach", "--quiet", str(before), arguments.revision], check=True)
        try:
            turns = []
            for number in range(arguments.rounds):
                order = 1 if number % 2 else -1
                turns.append(together([before, PROJECT], processors[::order], arguments))
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(before)], check=True)
    names = list(turns[0][0])
    old, new = ({name: median(pair[side].get(name, 0.0) for pair in turns) for name in names} for side in (0, 1))
    print(
        f"before: {subject.stdout.strip()}\n"
        f"medians of {arguments.rounds} rounds of {arguments.steps} steps, seconds of a step\n"
        f"{'phase':12}{'before':>9}{'now':>9}{'ratio':>8}"
    )
    for name in [*names, "step"]:
        one, two = (old[name], new[name]) if name in old else (sum(old.values()), sum(new.values()))
        print(f"{name:12}{one:9.3f}{two:9.3f}{two / one:8.3f}")
    print(f"ratio before_after {sum(new.values()) / sum(old.values()):.3f}")


if __name__ == "__main__":
    main()
