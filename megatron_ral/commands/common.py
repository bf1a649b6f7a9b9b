"""What the entry points share: arguments -> checked configuration, errors as one sentence, quiet third parties."""

import argparse
import logging
import os
import sys
import warnings
from typing import Callable, NoReturn

from megatron_ral.compat.versions import warn_untried_versions
from megatron_ral.config import RunConfig, check_layout, dump_config, load_config
from megatron_ral.errors import ConfigError
from megatron_ral.rewards.score import reward_parts


def parse_arguments(description: str, extra: Callable[[argparse.ArgumentParser], None]) -> argparse.Namespace:
    """`--config FILE [dotted.key=value ...]` and what `extra` adds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="YAML file")
    extra(parser)
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="settings that replace the file's")
    return parser.parse_intermixed_args()  # settings may stand before and behind a flag


def add_prompt_suffix(parser: argparse.ArgumentParser) -> None:
    """`--config FILE` and `--prompt-suffix TEXT` for tools that measure prompts as a run will; see `prompt_suffix`."""
    suffix = parser.add_mutually_exclusive_group()
    suffix.add_argument("--config", help="YAML file of the run that will read the shards, for its data.prompt_suffix")
    suffix.add_argument(
        "--prompt-suffix", default="", help="data.prompt_suffix itself; a run with another one does not use the indexes"
    )


def prompt_suffix(arguments: argparse.Namespace) -> str:
    """What `add_prompt_suffix` asked for.

    Raises:
        ConfigError: --config cannot be read.
    """
    if not arguments.config:
        return arguments.prompt_suffix
    return load_config(arguments.config, ["model.path=unused", "data.train=[{shards: unused}]"]).data.prompt_suffix


def quiet_third_parties() -> None:
    """Keep the log readable: ours speaks, libraries warn only where something is wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\..*|transformers\..*|torch\..*")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*")
    warn_untried_versions()


def fail(error: Exception, everywhere: bool = True) -> NoReturn:
    """One sentence, exit status 2.

    Args:
        everywhere: every rank found the same, so rank 0 alone speaks; False: this rank found it.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 or not everywhere:
        say_error(str(error) if everywhere else f"rank {rank}: {error}")
    leave(2)


def say_error(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


def leave(status: int) -> NoReturn:
    """End at once, whatever threads are alive."""
    # os._exit: with several ranks the launcher must see every one of them end, whatever threads are alive
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def read_config(arguments: argparse.Namespace, training: bool = True) -> RunConfig:
    """Configuration checked as far as it goes without torch; `training`: batch sizes against the ranks too. Imports the
    reward functions of the user's own."""
    config = load_config(arguments.config, arguments.overrides)
    try:
        reward_parts(config.reward)
    except ConfigError as error:
        raise ConfigError(str(error)) from None
    check_layout(config, int(os.environ.get("WORLD_SIZE", 1)), training)
    return config


def dry_run(config: RunConfig, shape, teacher=None) -> str:
    """Resolved configuration, layout of all ranks, and the parameters each holds, of the policy and of a teacher, as
    text."""
    from megatron_ral.parallel.rank_layout import RankLayout
    from megatron_ral.planning.parameters import describe_parameters

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    layout = RankLayout(
        0, world_size, config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    )
    text = f"{dump_config(config)}\n{layout.describe()}\n\n{describe_parameters(shape, layout)}"
    if teacher is not None:
        layout = RankLayout(0, world_size, *config.teacher_layout)
        text += f"\n\nteacher, on the same ranks:\n{layout.describe()}\n\n{describe_parameters(teacher, layout)}"
    return text


__all__ = [
    "ConfigError",
    "add_prompt_suffix",
    "dry_run",
    "fail",
    "leave",
    "parse_arguments",
    "prompt_suffix",
    "quiet_third_parties",
    "read_config",
    "say_error",
]
