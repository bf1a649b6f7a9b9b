"""Bytes that one optimizer step sends over data-parallel ranks, for 1, 4 and 16 micro-batches, in 4 processes.

    python -m tools.benchmarks.traffic [--micro-batches 1 4 16]

Two stages x two data-parallel ranks of a tiny model run on the fixed rollouts of the tests. Every collective is counted
where torch dispatches it. The table shows the first rank of the last stage for both values of `parallel.gather`: calls,
and bytes as a multiple of the stage's parameters (all-gather) or of its trained parameters (reduce-scatter, float32).
The last line is `ratio traffic VALUE`: bytes with the most micro-batches over bytes with the fewest, for
`gather=stage`.
"""

import argparse
import tempfile
from pathlib import Path

from tools.benchmarks.tiny_material import make_tiny_material


def main() -> None:
    """Run the steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--micro-batches", type=int, nargs="+", default=[1, 4, 16], help="numbers of micro-batches, divisors of 16"
    )
    counts = sorted(parser.parse_args().micro_batches)
    from tests.distributed.runner import run_ranks
    from tests.distributed.test_traffic import counted

    with tempfile.TemporaryDirectory() as folder:
        policy, other, data = make_tiny_material(Path(folder))
        results = {
            gather: run_ranks(4, counted, policy, other, data, counts, gather, timeout=600)[2]
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
