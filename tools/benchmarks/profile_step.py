"""Profile of a training step in one process: phases, operators of torch, Python functions.

    bash launch_scripts/ral_tiny.sh
    python -m tools.benchmarks.profile_step [--run outputs/ral_tiny] [--steps 4] [dotted.key=value ...]

The RL steps of a finished tiny run start from its weights after SFT and run four times:

    1. to warm up
    2. without a profiler, for the seconds of each phase. Compare these before and after a change
    3. under torch's profiler, for the own time of operators, the backward pass included
    4. under cProfile, for the own time of Python functions. It makes them several times slower: read shares, not
       seconds

The last line is `ratio profile VALUE`: processor seconds per step over those of its matrix products alone.
"""

import argparse
import cProfile
import os
import pstats
import tempfile
import time
from collections import defaultdict
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
MATRICES = (
    "aten::mm",
    "aten::bmm",
    "aten::addmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
)


def make_trainer(run: Path, folder: str, settings: list[str]):
    """Return the trainer of the RL run in this process alone, without the files it writes during training.

    Raises:
        CheckpointError: `run` holds no checkpoint of the RL run.
    """
    from megatron_ral.commands.common import import_libraries

    import_libraries()
    from megatron_ral.config import load_config
    from megatron_ral.errors import CheckpointError
    from megatron_ral.models.shape import read_shape
    from megatron_ral.parallel.process_groups import start_groups
    from megatron_ral.training.trainer import Inputs, Trainer

    resolved = next(iter(sorted((run / "rl" / "checkpoints").glob("step_*/config.yaml"))), None)
    if resolved is None:
        raise CheckpointError("--run", run, "holds no rl/checkpoints; make it with `bash launch_scripts/ral_tiny.sh`")
    config = load_config(
        resolved,
        [
            f"train.output_dir={folder}",
            "logging.tensorboard=false",
            "data.eval_shards=''",
            "logging.gradient_ratio_interval=0",
            *settings,
        ],
    )
    process_groups = start_groups(tensor_size=1, pipeline_size=1, seed=config.seed)
    return Trainer(config, read_shape(config.model.path), process_groups, Inputs.open(config, False))


def steps(trainer, first: int, count: int) -> tuple[dict[str, float], float]:
    """Run steps, and return (wall seconds by phase, processor seconds) per step."""
    phases, started = defaultdict(float), time.process_time()
    for step in range(first, first + count):
        for name, seconds in trainer._one_step(step).seconds.items():
            phases[name] += seconds / count
    return phases, (time.process_time() - started) / count


def main() -> None:
    """Profile the steps and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--run", type=Path, default=PROJECT / "outputs" / "ral_tiny", help="folder of a finished tiny run"
    )
    parser.add_argument("--steps", type=int, default=4, help="steps of each of the runs but the first")
    parser.add_argument("--rows", type=int, default=14, help="rows of each table")
    parser.add_argument("settings", nargs="*", metavar="dotted.key=value", help="settings that replace the run's")
    arguments = parser.parse_args()
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = "0"
    os.environ.update(WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("MASTER_PORT", "29611"))
    import torch

    from megatron_ral.errors import UserError

    torch.set_num_threads(1)
    count = arguments.steps
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = make_trainer(arguments.run, folder, arguments.settings)
        except UserError as error:
            parser.exit(2, f"error: {error}\n")
        steps(trainer, 0, 1)
        phases, processor = steps(trainer, 1, count)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            steps(trainer, 1 + count, count)
        python = cProfile.Profile()
        python.enable()
        steps(trainer, 1 + 2 * count, count)
        python.disable()
    wall = sum(phases.values())
    print(
        f"torch {torch.__version__}, 1 thread, {count} steps of {trainer.config.rollout.num_prompts} prompts x "
        f"{trainer.config.rollout.group_size} responses, {trainer.config.rollout.num_minibatches} updates"
    )
    print(f"\na step: {wall:.3f} s, {processor:.3f} s of processor time\n{'phase':12}{'s':>8}{'share':>8}")
    for name, seconds in phases.items():
        print(f"{name:12}{seconds:8.3f}{seconds / wall:8.1%}")
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    print(
        f"\noperators, own time ({whole / count / 1e6:.3f} s a step)\n{'operator':60}{'calls':>8}{'ms':>9}{'share':>8}"
    )
    for event in events[: arguments.rows]:
        print(
            f"{event.key[:58]:60}{event.count / count:8.0f}{event.self_cpu_time_total / count / 1e3:9.1f}"
            f"{event.self_cpu_time_total / whole:8.1%}"
        )
    table = pstats.Stats(python).stats
    total = sum(own for _, _, own, _, _ in table.values())
    print(f"\nfunctions, own time\n{'function':60}{'calls':>8}{'share':>8}")
    for (file, line, name), (_, calls, own, _, _) in sorted(table.items(), key=lambda item: -item[1][2])[
        : arguments.rows
    ]:
        place = name if file == "~" else f"{'/'.join(Path(file).parts[-2:])}:{line} {name}"
        print(f"{place[-58:]:60}{calls / count:8.0f}{own / total:8.1%}")
    print(f"\nfunctions of this project, with what they call\n{'function':60}{'calls':>8}{'share':>8}")
    ours = {key: value for key, value in table.items() if "megatron_ral" in Path(key[0]).parts}
    for (file, line, name), (_, calls, _, whole_time, _) in sorted(ours.items(), key=lambda item: -item[1][3])[
        : 3 * arguments.rows
    ]:
        print(
            f"{'/'.join(Path(file).parts[-2:])}:{line} {name}"[-58:].ljust(60)
            + f"{calls / count:8.0f}{whole_time / total:8.1%}"
        )
    matrices = sum(event.self_cpu_time_total for event in events if event.key in MATRICES) / count / 1e6
    print(f"ratio profile {processor / matrices:.2f}")


if __name__ == "__main__":
    main()
