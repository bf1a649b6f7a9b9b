"""Code that the commands share: arguments -> checked configuration, errors as one sentence, quiet third parties."""

import argparse
import contextlib
import functools
import logging
import os
import sys
import warnings
from typing import Callable, Iterator, NoReturn, Optional, Sequence

from megatron_ral.compat.versions import warn_untried_versions
from megatron_ral.config import RunConfig, check_layout, dump_config, load_config
from megatron_ral.errors import UserError
from megatron_ral.rewards.score import reward_parts

Arguments = Optional[Sequence[str]]
"""Command-line arguments; None for those of the process."""


def parse_arguments(
    description: str, add_options: Callable[[argparse.ArgumentParser], None], argv: Arguments
) -> argparse.Namespace:
    """Parse `--config FILE [dotted.key=value ...]` and the options of one command."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    add_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="settings that replace the file's")
    return parser.parse_intermixed_args(argv)  # settings may stand before and behind a flag


def add_prompt_suffix(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE` and `--prompt-suffix TEXT`, for commands that measure prompts; see `prompt_suffix`."""
    suffix = parser.add_mutually_exclusive_group()
    suffix.add_argument("--config", help="YAML file of the run that will read the shards, for its data.prompt_suffix")
    suffix.add_argument(
        "--prompt-suffix",
        default="",
        help="data.prompt_suffix itself; a run with another one does not use the indexes",
    )


def prompt_suffix(arguments: argparse.Namespace) -> str:
    """Return the prompt suffix that the options of `add_prompt_suffix` give.

    Raises:
        ConfigError: --config cannot be read.
    """
    if not arguments.config:
        return arguments.prompt_suffix
    return load_config(arguments.config, ["model.path=unused", "data.train=[{shards: unused}]"]).data.prompt_suffix


def quiet_third_parties() -> None:
    """Silence notes of libraries, so that the log holds ours and their real warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\..*|transformers\..*|torch\..*")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*")
    warn_untried_versions()


def import_libraries() -> None:
    """Import megatron-core and DeepSpeed, on the CPU where no accelerator is. Call this before modules that import
    them."""
    from megatron_ral.compat import cpu_backend, lazy_compile

    cpu_backend.choose_deepspeed_accelerator()
    lazy_compile.import_libraries()


def command(body: Callable[[Arguments], Optional[int]]) -> Callable[..., int]:
    """Make the `main` of a command in one process: a `UserError` becomes one sentence and exit status 2."""

    @functools.wraps(body)
    def main(argv: Arguments = None) -> int:
        try:
            return body(argv) or 0
        except UserError as error:
            say_error(str(error))
            return 2

    return main


@contextlib.contextmanager
def one_sentence(everywhere: bool = True) -> Iterator[None]:
    """End a process of several ranks with one sentence and exit status 2 at a `UserError`; see `fail`."""
    try:
        yield
    except UserError as error:
        fail(error, everywhere)


def fail(error: Exception, everywhere: bool = True) -> NoReturn:
    """Print one sentence and end with exit status 2.

    Args:
        everywhere: every rank has found the same error, so that rank 0 alone prints it. False: only this rank has.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 or not everywhere:
        say_error(str(error) if everywhere else f"rank {rank}: {error}")
    leave(2)


def say_error(text: str) -> None:
    """Print a sentence to stderr in the form of all errors."""
    print(f"error: {text}", file=sys.stderr, flush=True)


def leave(status: int) -> NoReturn:
    """End the process at once, without waiting for its threads."""
    # os._exit: with several ranks the launcher must see every one of them end, whatever threads are alive
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def read_config(arguments: argparse.Namespace, training: bool = True) -> RunConfig:
    """Read the configuration and check it as far as that goes without torch. Imports the user's reward functions.

    Args:
        training: check batch sizes against the number of ranks as well.

    Raises:
        ConfigError: it cannot be used.
    """
    config = load_config(arguments.config, arguments.overrides)
    reward_parts(config.reward)
    check_layout(config, int(os.environ.get("WORLD_SIZE", 1)), training)
    return config


def _overlap(config: RunConfig, data_size: int) -> str:
    """Return what `rollout.overlap` does in a run."""
    rollout, updates = config.rollout, config.updates_per_rollout
    share = rollout.num_prompts // data_size
    sampler = (
        "the native sampler makes it before the updates, on the same devices"
        if rollout.sampler == "native"
        else f"{rollout.sampler} works at it during the updates"
    )
    return (
        f"overlap: step k trains on a rollout sampled {updates} updates before, with loss.sampler_correction = "
        f"{config.loss.sampler_correction}; {sampler}. A rank then holds {share} more prompts with their responses in "
        "host memory, and each checkpoint holds the responses"
    )


def dry_run(config: RunConfig, shape, teacher=None) -> str:
    """Return the resolved configuration, the layout of all ranks, and the parameters that each holds, as text.

    Args:
        shape: `ModelShape` of the policy.
        teacher: that of the teacher; None for no teacher.
    """
    from megatron_ral.parallel.rank_layout import RankLayout
    from megatron_ral.planning.parameters import describe_parameters

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    layout = RankLayout(
        0, world_size, config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    )
    text = f"{dump_config(config)}\n{layout.describe()}\n\n{describe_parameters(shape, layout)}"
    if config.overlaps:
        text += f"\n\n{_overlap(config, layout.data_size)}"
    if teacher is not None:
        layout = RankLayout(0, world_size, *config.teacher_layout)
        text += f"\n\nteacher, on the same ranks:\n{layout.describe()}\n\n{describe_parameters(teacher, layout)}"
    return text
