"""Count what a step costs a GPU beside arithmetic, without a GPU: kernels, collectives, waits of the host, masks.

    python tools/benchmarks/gpu_work.py [--run ral_7b] [--model qwen2.5-vl-7b] [--world-size 8] [--stage 0]
                                        [--json FILE] [dotted.key=value ...]

The code of a GPU runs one step of one rank on CUDA tensors without memory (`compat/cuda_fakes.py`). Numbers of a phase
are those of one unit: a picture, a batch of prompts, a token of a batch, a micro-batch. "Recorded" kernels belong to a
CUDA graph, which is one launch. Kernels of Triton count one each. The last lines count what the attention term adds to
an update, on the stage that has its layers: the kernels of an update with it less those of one without it, and the sum
over operators that it adds to (the recorded layer is not recomputed, which takes others away).
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from megatron_ral.commands.common import quiet_third_parties
from megatron_ral.config import load_config

PROJECT = Path(__file__).resolve().parents[2]


def plan_of(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return (shape of the model, plan of the launch)."""
    from megatron_ral.models.shape import read_shape
    from megatron_ral.planning.launch_plan import LaunchPlan

    configs = PROJECT / "pretrained_configs"
    folder = f"model.path={configs / 'models' / arguments.model}"
    config = load_config(configs / "runs" / f"{arguments.run}.yaml", [folder, *arguments.overrides])
    return read_shape(config.model.path), LaunchPlan.from_config(config, arguments.world_size)


def counts(phases: dict[str, Any]) -> dict[str, dict]:
    """Return the counts of every phase, by phase."""
    result = {}
    for name, phase in phases.items():
        seen, units = phase.seen, phase.simulated
        waits, calls = (
            {key: round(value / units, 2) for key, value in part.items()} for part in (seen.waits, seen.attention)
        )
        result[name] = {
            "kernels": round(seen.kernels.total() / units),
            "recorded": round(seen.recorded.total() / units),
            "collectives": round(phase.traffic.calls.total() / units),
            "waits": waits,
            "attention": calls,
            "mask_bytes": seen.mask_bytes,
            "peak_gib": round(seen.peak_bytes / 2**30, 2),
        }
    return result


def main() -> None:
    """Print the table."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a simulation must not take memory of a GPU
    quiet_third_parties()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="ral_7b", help="name of a file in pretrained_configs/runs")
    parser.add_argument("--model", default="qwen2.5-vl-7b", help="name of a folder in pretrained_configs/models")
    parser.add_argument("--world-size", type=int, default=8)
    parser.add_argument("--stage", type=int, default=0, help="pipeline stage of the rank")
    parser.add_argument("--json", type=Path, help="file for the counts")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    arguments = parser.parse_intermixed_args()
    from megatron_ral.planning.simulate import simulate, term_kernels

    shape, plan = plan_of(arguments)
    rank = simulate(shape, plan, plan.layout.with_rank(plan.layout.rank_of(0, 0, arguments.stage)))
    phases = counts(rank.phases)
    print("| phase | kernels | recorded | collectives | waits | attention calls | largest mask | peak GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, phase in phases.items():
        waits, calls = (round(sum(phase[key].values()), 1) for key in ("waits", "attention"))
        print(
            f"| {name} | {phase['kernels']} | {phase['recorded']} | {phase['collectives']} | {waits:g} | {calls:g} "
            f"| {phase['mask_bytes']} | {phase['peak_gib']} |"
        )
    for name, phase in phases.items():
        for key in ("waits", "attention"):
            for what, number in phase[key].items():
                print(f"{name}: {number:g} x {what}")
    if "update" in rank.phases:
        kernels = term_kernels(shape, plan, rank).values()
        difference, added = round(sum(kernels)), round(sum(number for number in kernels if number > 0))
        print(f"attention term: {difference} kernels of a micro-batch; operators that it adds to: {added}")
        phases["update"] |= {"attention_term": difference, "attention_term_added": added}
    if arguments.json:
        arguments.json.write_text(json.dumps(phases, indent=1) + "\n")


if __name__ == "__main__":
    main()
