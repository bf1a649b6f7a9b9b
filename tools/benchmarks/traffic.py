"""Bytes that a step sends over the ZeRO-3 group, counted for 1, 4 and 16 micro-batches, in 4 processes.

    python tools/benchmarks/traffic.py [--micro-batches 1 4 16]

Two stages x two data-parallel ranks of a tiny model on the fixed rollouts of the tests; every collective is counted where
torch dispatches it. Printed for both values of `parallel.gather`, of the last stage's first rank, with the calls, and bytes
as a multiple of the stage's parameters (all-gather) and trained parameters (reduce-scatter, float32). The last line is
`ratio traffic VALUE`: bytes sent with the most micro-batches over those with the fewest, `gather=stage`.
"""

import argparse
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4, 16], help="divisors of 16")
    counts = sorted(parser.parse_args().micro_batches)
    from tests.conftest import perturbed_copy, run_tool
    from tests.distributed.runner import run_ranks
    from tests.distributed.test_traffic import counted

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
        policy, other = (perturbed_copy(root / "made", root / name, seed=seed) for name, seed in (("a", 1), ("b", 2)))
        results = {
            gather: run_ranks(4, counted, str(policy), str(other), str(root / "data"), counts, gather, timeout=600)[2]
            for gather in ("stage", "layer")
        }
    print("PP=2 x DP=2, last stage; calls, and bytes relative to its parameters")
    heads = ("all-gather", "reduce-scatter")
    print(f"{'parallel.gather':16}{'micro-batches':>14}{heads[0]:>26}{heads[1]:>26}{'all-reduce':>14}")
    for gather, result in results.items():
        for count in counts:
            cells = []
            for kind, whole in (("all-gather", result["whole"]), ("reduce-scatter", result["trained"])):
                calls, sent = result["counted"][count][kind]
                cells.append(f"{calls} x, {sent:,} ({sent / whole:.2f})")
            scalars = result["counted"][count].get("all-reduce", (0, 0))
            print(f"{gather:16}{count:14}{cells[0]:>26}{cells[1]:>26}{scalars[1]:>12} B")
    totals = [sum(sent for _, sent in results["stage"]["counted"][count].values()) for count in (counts[0], counts[-1])]
    print(f"ratio traffic {totals[1] / totals[0]:.3f}")


if __name__ == "__main__":
    main()
