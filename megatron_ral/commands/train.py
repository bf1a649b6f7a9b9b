"""Train a model as a configuration says: supervised, with RL (GRPO, RAL), or from a teacher.

    torchrun ... -m megatron_ral.train --config FILE [dotted.key=value ...] [--resume] [--dry-run | --preflight]

Checks everything that needs no memory first, and on several ranks compares all of them, before anything is built.
Leaves checkpoints, TensorBoard files, summary.json and the exported model in train.output_dir. Exit status: 0 done,
stopped or out of time, with a checkpoint; 2 wrong input; anything else: a rank failed.
"""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_ral.commands.common import (
    Arguments,
    dry_run,
    fail,
    import_libraries,
    leave,
    parse_arguments,
    quiet_third_parties,
    read_config,
    say_error,
)
from megatron_ral.config import RunConfig
from megatron_ral.config.rule import setting
from megatron_ral.errors import AgreedError, ConfigError, UserError

if TYPE_CHECKING:
    from megatron_ral.models.shape import ModelShape


def _options(parser) -> None:
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in train.output_dir")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and layout, and exit")
    parser.add_argument(
        "--preflight", action="store_true", help="compare versions, settings and files of all ranks, and exit"
    )


def _check_models(config: RunConfig):
    """Return the shapes of the policy and of the teacher (None without one).

    Raises:
        ConfigError: a model folder contradicts the settings, or another model folder.
    """
    from megatron_ral.engine.settings import shape_from_config
    from megatron_ral.models.shape import read_shape
    from megatron_ral.rollout.served.settings import check_sampler_from_config
    from megatron_ral.weights.peft_folder import check_adapters

    shape = shape_from_config(config)
    shape.check_layout(config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size)
    shape.layer_indices(config.loss.attention_layers)
    shape.layer_indices(config.rollout.attention_noise.layers, "rollout.attention_noise.layers")
    if config.train.algorithm == "ral":
        _check_trained_attention(config, shape)
    check_sampler_from_config(config, shape)
    check_adapters(config.adapter.path, shape)
    if config.model.reference_path:
        shape.check_same_architecture(
            read_shape(config.model.reference_path, "model.reference_path"), "model.reference_path"
        )
    if not config.distills:
        return shape, None
    shape.layer_indices(config.distill.attention_layers, "distill.attention_layers")
    teacher = read_shape(config.teacher.path, "teacher.path")
    teacher.check_layout(*config.teacher_layout, section="teacher")
    shape.check_teacher(teacher)
    if config.distill.top_tokens > min(shape.vocab_size, teacher.vocab_size):
        raise ConfigError(
            "distill.top_tokens",
            config.distill.top_tokens,
            f"is more than the {min(shape.vocab_size, teacher.vocab_size)} tokens of the vocabulary; 0 takes all",
        )
    return shape, teacher


def _check_trained_attention(config: RunConfig, shape: "ModelShape") -> None:
    """Raise ConfigError if a recorded layer's attention depends on no trained weight."""
    if shape.adapter is None or {"q_proj", "k_proj"} & set(shape.adapter.targets):
        return
    keys = ["loss.attention_layers"] + ["distill.attention_layers"] * config.distills
    for key in keys:
        layers = setting(config, key)
        if 0 in shape.layer_indices(layers, key):
            raise ConfigError(
                key,
                list(layers),
                "names the first layer, whose attention no adapter reaches; add q_proj or k_proj to adapter.targets, "
                "or name later layers",
            )


def main(argv: Arguments = None) -> NoReturn:
    """Train, and end the process."""
    _train(argv)
    leave(0)  # without waiting for threads that decode samples of a step that will not come


def _train(argv: Arguments) -> None:
    started = time.monotonic()
    quiet_third_parties()
    arguments = parse_arguments(__doc__ or "", _options, argv)
    config = shape = teacher = None
    problems: list[Exception] = []
    try:
        config = read_config(arguments)
        shape, teacher = _check_models(config)
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0 or arguments.dry_run:
            fail(error)
        problems.append(error)  # this rank may be the only one; the first one will say so
    if arguments.dry_run:
        if int(os.environ.get("RANK", 0)) == 0:
            assert config is not None  # `fail` ended a dry run whose configuration has an error
            print(dry_run(config, shape, teacher))
        return

    import_libraries()
    from megatron_ral.parallel.process_groups import start_groups, stop_groups
    from megatron_ral.planning.launch_facts import LaunchSettings
    from megatron_ral.planning.launch_plan import LaunchPlan
    from megatron_ral.planning.memory import check_fits
    from megatron_ral.planning.preflight import check_launch
    from megatron_ral.runtime.progress import progress
    from megatron_ral.runtime.rendezvous import RendezvousError
    from megatron_ral.runtime.stopping import StopRequests
    from megatron_ral.runtime.watchdog import Watchdog
    from megatron_ral.training.trainer import Inputs, TooManySkippedSteps, Trainer

    inputs = None
    if config is not None and shape is not None:  # everything on disk is read before any memory is taken
        try:
            if teacher is not None:
                check_fits(LaunchPlan.from_config(config, int(os.environ.get("WORLD_SIZE", 1))), shape, teacher)
        except (UserError, OSError) as error:
            problems.append(error)
        try:
            inputs = Inputs.open(config, arguments.resume)
        except (UserError, OSError) as error:
            problems.append(error)
    try:
        settings = LaunchSettings.from_config(config) if config is not None else None
        line = check_launch(settings, shape, teacher, problems, {"--resume": arguments.resume}, say=say_error)
    except (AgreedError, RendezvousError):  # printed by `check_launch`
        leave(2)
    if int(os.environ.get("RANK", 0)) == 0 and (arguments.preflight or int(os.environ.get("WORLD_SIZE", 1)) > 1):
        print(line, flush=True)
    if arguments.preflight:
        return
    assert config is not None and shape is not None and inputs is not None, "the preflight ends a launch with problems"
    if config.parallel.sequence_parallel and config.parallel.tensor_model_parallel_size > 1:
        # megatron-core relies on one queue: it starts communication before the product that it is to overlap with.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    process_groups = start_groups(
        tensor_size=config.parallel.tensor_model_parallel_size,
        pipeline_size=config.parallel.pipeline_model_parallel_size,
        seed=config.seed,
        timeout_minutes=config.parallel.timeout_minutes,
    )
    watchdog = Watchdog(
        process_groups.layout.rank,
        process_groups.layout.world_size,
        config.watchdog.timeout_seconds,
        config.watchdog.long_timeout_seconds,
        watches_waiting=process_groups.device.type == "cpu",
        log=Path(config.train.output_dir) / "watchdog.log",
    )
    stopping = StopRequests(config.train.time_limit_minutes, started)
    stopping.listen()
    try:
        Trainer(config, shape, process_groups, inputs, teacher, stopping).run()
    except (AgreedError, TooManySkippedSteps) as error:
        watchdog.leave()
        fail(error)
    except UserError as error:
        watchdog.announce(f"ended with an error: {error}")
        fail(error, everywhere=False)
    except BaseException as error:
        watchdog.end_with(error)
    with progress.within("leaving"):
        watchdog.leave()
        stop_groups()
