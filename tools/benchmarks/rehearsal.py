"""Rehearsed memory and traffic of one optimizer step against real ones, in 4 processes on a tiny model.

    python -m tools.benchmarks.rehearsal

Measured are the live bytes of all tensors that each process makes during the step, not the resident memory of the
process, because an allocator on CPUs blurs it. `planning/` rehearses the same bytes. The table has one row per layout
and pipeline stage.
"""

import argparse
import tempfile
from pathlib import Path

from tools.benchmarks.tiny_material import make_tiny_material


def main() -> None:
    """Run and rehearse the steps, and print the table."""
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    from tests.distributed.runner import run_ranks
    from tests.distributed.test_rehearsal import CASES, real_step, rehearsed_step

    with tempfile.TemporaryDirectory() as folder:
        policy, other, data = make_tiny_material(Path(folder))
        print(
            "| tensor x pipeline x data | settings | stage | bytes alive, measured | rehearsed | difference | "
            "bytes sent, counted | rehearsed | difference |\n|---|---|---|---|---|---|---|---|---|"
        )
        for tensor, pipeline, settings in CASES:
            real = run_ranks(4, real_step, policy, other, data, tensor, pipeline, settings, timeout=600)
            [rehearsed] = run_ranks(
                1, rehearsed_step, policy, tensor, pipeline, real[0]["P"], real[0]["visual"], settings, timeout=600
            )
            chosen = ", ".join(
                f"{key}={str(value).lower()}" for key, value in settings.get("parallel", settings).items()
            )
            for stage, mine in sorted(rehearsed.items()):
                ranks = [rank for rank in real if rank["stage"] == stage]
                measured = max(rank["peak"] for rank in ranks)
                sent, counted = sum(mine["sent"].values()), sum(ranks[0]["sent"].values())
                print(
                    f"| {tensor} x {pipeline} x {4 // tensor // pipeline} | {chosen or '-'} | {stage} | {measured:,} | "
                    f"{mine['peak']:,} | {100 * (mine['peak'] / measured - 1):+.1f} % | {counted:,} | {sent:,.0f} | "
                    f"{100 * (sent / counted - 1):+.1f} % |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
