"""Rehearse a launch of N ranks in this process, without GPUs: what every distinct rank would hold, send and take.

    python tools/rehearse.py --config FILE --world-size N [dotted.key=value ...] [--search]

The stages of every distinct rank are built and run through one RL step by the real code, with tensors that have sizes and
no contents; ZeRO-3 is arithmetic on the sizes of their parameters. Prompts and responses are as long as the configuration
allows. Bytes are counted, seconds are estimates from the stated speeds (`--help` lists them). --search tries layouts of the
same number of ranks and prints the five that promise most. Exit status 1: it does not fit; 2: it cannot work.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a rehearsal takes nothing of a GPU


def main() -> None:
    """Print the rehearsal."""
    from megatron_ral.commands.common import fail, quiet_third_parties

    quiet_third_parties()
    from megatron_ral.compat.cpu_backend import choose_deepspeed_accelerator

    choose_deepspeed_accelerator()
    from megatron_ral.config import load_config
    from megatron_ral.errors import ConfigError
    from megatron_ral.models.shape import read_shape
    from megatron_ral.planning.hardware import Hardware
    from megatron_ral.planning.launch_plan import LaunchPlan
    from megatron_ral.planning.rehearse import rehearse
    from megatron_ral.planning.report import describe
    from megatron_ral.planning.search import search, way_out

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("--world-size", type=int, required=True, help="ranks (GPUs)")
    parser.add_argument(
        "--visual-tokens",
        type=int,
        default=-1,
        help="of each prompt; default: as many as data.max_visual_tokens and max_prompt_length allow",
    )
    parser.add_argument("--search", action="store_true", help="try layouts, print the best five that fit")
    parser.add_argument("--row", action="store_true", help="print one row of docs/hardware.md")
    for item in dataclasses.fields(Hardware):
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            type=type(item.default),
            default=item.default,
            help=f"default {item.default}",
        )
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="settings that replace the file's")
    arguments = parser.parse_intermixed_args()
    hardware = Hardware(**{item.name: getattr(arguments, item.name) for item in dataclasses.fields(Hardware)})
    try:
        config = load_config(arguments.config, arguments.overrides)
        shape = read_shape(config.model.path)
        plan = LaunchPlan.from_config(config, arguments.world_size, arguments.visual_tokens)
        if arguments.search:
            print(search(plan, shape, hardware))
            return
        result = rehearse(plan, shape, hardware)
        print(describe(result, row=arguments.row))
        if not result.fits and not arguments.row:
            print(way_out(result, shape))
            sys.exit(1)
    except ConfigError as error:
        fail(error)


if __name__ == "__main__":
    main()
