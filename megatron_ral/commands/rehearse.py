"""Rehearse a launch of N ranks in one process, without GPUs: memory, traffic and time of every distinct rank.

    megatron-ral rehearse --config FILE --world-size N [dotted.key=value ...] [--search]

The real code builds the stages of every distinct rank and runs one RL step through them, on tensors that have sizes and
no contents. ZeRO-3 is arithmetic on the sizes of their parameters. Prompts and responses are as long as the
configuration allows. Bytes are counted; seconds are estimates from the speeds given as options below. --search tries
layouts of the same number of ranks and prints the five most promising ones. Also `python tools/rehearse.py`.

Exit status: 0 it fits; 1 it does not fit; 2 wrong input.
"""

import argparse
import dataclasses
import os

from megatron_ral.commands.common import Arguments, command, import_libraries, quiet_third_parties
from megatron_ral.config import load_config


@command
def main(argv: Arguments = None) -> int:
    """Print the rehearsal; return 1 where the run does not fit."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a rehearsal must not take memory of a GPU
    quiet_third_parties()
    import_libraries()
    from megatron_ral.engine.settings import shape_from_config
    from megatron_ral.planning.hardware import Hardware
    from megatron_ral.planning.launch_plan import LaunchPlan
    from megatron_ral.planning.rehearse import rehearse
    from megatron_ral.planning.report import describe
    from megatron_ral.planning.search import search, way_out

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--world-size", type=int, required=True, help="number of ranks (GPUs)")
    parser.add_argument(
        "--visual-tokens",
        type=int,
        default=-1,
        help="visual tokens of each prompt (default: as many as data.max_visual_tokens and max_prompt_length allow)",
    )
    parser.add_argument("--search", action="store_true", help="try layouts and print the best five that fit")
    parser.add_argument("--row", action="store_true", help="print one row of docs/results/hardware.md")
    for item in dataclasses.fields(Hardware):
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            type=type(item.default),
            default=item.default,
            help=f"default {item.default}",
        )
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="settings that replace the file's")
    arguments = parser.parse_intermixed_args(argv)
    hardware = Hardware(**{item.name: getattr(arguments, item.name) for item in dataclasses.fields(Hardware)})
    config = load_config(arguments.config, arguments.overrides)
    shape = shape_from_config(config)
    plan = LaunchPlan.from_config(config, arguments.world_size, arguments.visual_tokens)
    if arguments.search:
        print(search(plan, shape, hardware))
        return 0
    result = rehearse(plan, shape, hardware)
    print(describe(result, row=arguments.row))
    if result.fits or arguments.row:
        return 0
    print(way_out(result, shape))
    return 1
