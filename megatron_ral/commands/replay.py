"""Repeat an optimizer step whose loss or gradient was not finite, and report which values are not.

    torchrun ... -m megatron_ral.replay FOLDER

FOLDER is one of <output_dir>/replay of a run, whose log holds the whole command. Start as many processes as the run
had. Exit status: 0 not finite again; 1 finite this time (another machine or version); 2 it cannot be repeated.
"""

import argparse
import math
import os
from dataclasses import replace
from pathlib import Path

from megatron_ral.commands.common import Arguments, import_libraries, one_sentence, quiet_third_parties
from megatron_ral.config import load_config
from megatron_ral.errors import ConfigError


def main(argv: Arguments = None) -> int:
    """Repeat the step; wrong input ends the process with exit status 2."""
    quiet_third_parties()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder of <output_dir>/replay")
    folder, world_size = parser.parse_args(argv).folder, int(os.environ.get("WORLD_SIZE", 1))

    import_libraries()
    from megatron_ral.data.processor import PromptProcessor
    from megatron_ral.engine.settings import shape_from_config
    from megatron_ral.models.folder import read_json
    from megatron_ral.models.shape import read_shape
    from megatron_ral.objectives.supervised import supervised_objective
    from megatron_ral.parallel.process_groups import start_groups, stop_groups
    from megatron_ral.training.build import build_objective, build_policy, build_teacher
    from megatron_ral.training.replay import run_again
    from megatron_ral.training.replay_files import MANIFEST, load_replay

    with one_sentence():
        manifest = read_json(folder / MANIFEST, "step", "update", "world_size", "metrics")
        if manifest["world_size"] != world_size:
            raise ConfigError(
                f"'{folder}'",
                None,
                f"is of a run with {manifest['world_size']} processes, not {world_size}; start as many",
            )
        places = [f"model.path='{folder / 'hf'}'"]
        if (folder / "adapter").is_dir():
            places.append(f"adapter.path='{folder / 'adapter'}'")
        config = load_config(folder / "config.yaml", places)
        batches, _, tensors = load_replay(folder, int(os.environ.get("RANK", 0)))
        shape = shape_from_config(config)
        teacher_shape = read_shape(config.teacher.path, "teacher.path") if config.distills else None
    process_groups = start_groups(
        tensor_size=config.parallel.tensor_model_parallel_size,
        pipeline_size=config.parallel.pipeline_model_parallel_size,
        seed=config.seed,
        timeout_minutes=config.parallel.timeout_minutes,
    )
    objective = supervised_objective()
    if config.train.algorithm == "ral":
        teacher = None
        if teacher_shape is not None:
            processor = PromptProcessor.from_config(config)
            teacher = build_teacher(config, teacher_shape, shape, process_groups, processor)
        objective = build_objective(config, shape, process_groups, teacher)
        term = objective.term("attention")
        coef = manifest["metrics"].get("attention/coef", term.coefficient)
        objective = objective.with_term(replace(term, coefficient=coef if math.isfinite(coef) else 1.0))
    policy = build_policy(config, shape, process_groups, require_finite=False)
    again, lines, passes = run_again(policy, batches, tensors, objective)
    if process_groups.layout.rank == 0:
        print(
            f"step {manifest['step']}, update {manifest['update']}: {len(batches)} micro-batches on each of "
            f"{process_groups.layout.data_size} data-parallel ranks"
        )
        print("\n".join(lines + [str(made) for made in passes]))
        print(
            "reproduced: the loss or the gradient is not finite"
            if again
            else "not reproduced: the loss and the gradient are finite here",
            flush=True,
        )
    stop_groups()
    return 0 if again else 1
