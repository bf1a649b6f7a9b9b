"""Rehearsed against measured memory and counted bytes of one optimizer step, in 4 processes on a tiny model.

    python tools/benchmarks/rehearsal.py

Measured are live bytes of all tensors that each process makes while it runs the step (not resident memory of the process,
which a CPU allocator blurs), rehearsed the same by `planning/`. Printed per layout and pipeline stage.
"""

import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))


def main() -> None:
    """Print the table."""
    from tests.conftest import perturbed_copy, run_tool
    from tests.distributed.runner import run_ranks
    from tests.distributed.test_rehearsal import CASES, played_step, real_step

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        run_tool("make_tiny_model.py", "--output", root / "made")
        run_tool(
            "make_digit_search.py",
            "--output",
            root / "data",
            "--num-single",
            64,
            "--num-search",
            128,
            "--num-biased",
            32,
            "--num-rl",
            128,
            "--num-heldout",
            64,
            "--shard-size",
            16,
        )
        policy, other = (
            str(perturbed_copy(root / "made", root / name, seed=seed)) for name, seed in (("a", 1), ("b", 2))
        )
        print(
            "| tensor x pipeline x data | settings | stage | bytes alive, measured | rehearsed | difference | bytes sent, "
            "counted | rehearsed | difference |\n|---|---|---|---|---|---|---|---|---|"
        )
        for tensor, pipeline, settings in CASES:
            real = run_ranks(4, real_step, policy, other, str(root / "data"), tensor, pipeline, settings, timeout=600)
            [played] = run_ranks(
                1, played_step, policy, tensor, pipeline, real[0]["P"], real[0]["visual"], settings, timeout=600
            )
            chosen = ", ".join(
                f"{key}={str(value).lower()}" for key, value in settings.get("parallel", settings).items()
            )
            for stage, mine in sorted(played.items()):
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
