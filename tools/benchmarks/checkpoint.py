"""Cost of a checkpoint for a training run, written at once or in a thread during training.

    python -m tools.benchmarks.checkpoint [--hidden-size 512] [--num-layers 6] [--steps 3] [--saves 5] [--folder DIR]

One process runs supervised steps of a model of the given size. A period is --steps steps and one save. The three modes
(no save, at once, in a thread) take turns. The cost of a mode is its shortest period minus the shortest period without
a save, because other work on the machine only adds time. Printed are the bytes of a checkpoint, the seconds of one
step, and for each mode the seconds of a save and the part of it inside `save`. `ratio checkpoint_at_once` and
`ratio checkpoint_in_thread` are the cost of a save over one step.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
PROJECT = Path(__file__).resolve().parents[2]

CONFIG = """
model: {dtype: float32}
optimizer: {learning_rate: 1.0e-4}
train: {algorithm: sft, num_steps: 1000, batch_size: 8, micro_batch_size: 8, keep_checkpoints: 1}
logging: {tensorboard: false}
"""


def make_inputs(root: Path, arguments: argparse.Namespace) -> None:
    """Make the model, the data and the configuration."""
    model = [
        "make_tiny_model.py",
        "--output",
        root / "model",
        "--hidden-size",
        arguments.hidden_size,
        "--num-layers",
        arguments.num_layers,
    ]
    data = [
        "make_digit_search.py",
        "--output",
        root / "data",
        "--num-single",
        32,
        "--num-search",
        32,
        "--num-biased",
        8,
        "--num-rl",
        8,
        "--num-heldout",
        8,
    ]
    for tool, *rest in (model, data):
        subprocess.run(
            [sys.executable, str(PROJECT / "tools" / tool), *map(str, rest)],
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )
    (root / "run.yaml").write_text(CONFIG)


def measure(root: Path, arguments: argparse.Namespace) -> None:
    """Train and print the costs."""
    from megatron_ral.commands.common import import_libraries, quiet_third_parties

    quiet_third_parties()
    import_libraries()
    from megatron_ral.config import load_config
    from megatron_ral.models.shape import read_shape
    from megatron_ral.parallel.process_groups import start_groups, stop_groups
    from megatron_ral.training.step import sft_step
    from megatron_ral.training.trainer import Inputs, Trainer

    config = load_config(
        root / "run.yaml",
        [
            f"model.path={root}/model",
            f"train.output_dir={root}/out",
            f"data.train=[{{shards: '{root}/data/search-*.tar'}}]",
        ],
    )
    process_groups = start_groups(tensor_size=1, pipeline_size=1, seed=0)
    trainer = Trainer(config, read_shape(config.model.path), process_groups, Inputs.open(config, False))
    writer = trainer.checkpoints

    def step() -> None:
        sft_step(
            trainer.policy, trainer.loader.take(trainer.prompts_per_step), trainer.processor, trainer.step_settings
        )

    def period(mode: str, number: int) -> tuple[float, float]:
        """Return the seconds of a save with the steps after it, and the seconds inside the save."""
        started = time.perf_counter()
        if mode != "none":
            writer.save(number, wait=mode == "at once")
        inside = time.perf_counter() - started
        for _ in range(arguments.steps):
            step()
            writer.poll()
        whole = time.perf_counter() - started
        writer.finish()  # writing that is left over is printed, but not counted as a cost
        late = time.perf_counter() - started - whole
        if late > 0.05:
            print(f"  save {number}: {late:.2f} s of writing were left after {arguments.steps} steps")
        return whole, inside

    for mode in ("none", "at once", "in thread"):  # page-locked or plain, the buffers of a run are made once
        period(mode, 1 if mode == "at once" else 2)
    seconds = {"none": [], "at once": [], "in thread": []}
    for number in range(arguments.saves):
        for index, (mode, found) in enumerate(seconds.items()):
            found.append(period(mode, 3 + 3 * number + index))
    stop_groups()
    folder = root / "out" / "checkpoints" / "latest"
    size = sum(path.stat().st_size for path in folder.iterdir())
    one_step = min(whole for whole, _ in seconds["none"]) / arguments.steps
    print(f"checkpoint: {size:,} bytes; one step: {one_step:.3f} s")
    for mode in ("at once", "in thread"):
        cost = min(whole for whole, _ in seconds[mode]) - one_step * arguments.steps
        inside = min(inside for _, inside in seconds[mode])
        print(f"{mode}: a save costs {cost:.3f} s, {inside:.3f} s of it before the next step")
        print(f"ratio checkpoint_{mode.replace(' ', '_')} {cost / one_step:.2f}")


def main() -> None:
    """Make the inputs, measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512, help="width of the language model")
    parser.add_argument("--num-layers", type=int, default=6, help="layers of the language model")
    parser.add_argument("--steps", type=int, default=3, help="steps after each save")
    parser.add_argument("--saves", type=int, default=5, help="saves of each mode")
    parser.add_argument("--folder", help="folder to work in (default: a temporary one)")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        make_inputs(root, arguments)
        measure(root, arguments)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
