"""Time and memory of an update as work grows, with the exponent of each.

    python -m tools.benchmarks.growth [--scale 4] [--layers 2] [--rounds 2] [--largest 8192] [--series P R G M D]

One size is doubled while the others stay: visual tokens P of a prompt, tokens R of a response, responses G, and
micro-batches M (updates of more groups, one group each). The update is the gradient of GRPO with the attention term of
the last layer; AdamW is left out, which does not depend on them. The model is that of padding.py. Memory is the peak of
live bytes of the processor's tensors above parameters, gradients and inputs, counted in an update of its own.

Series D runs the first size on 1, 2, .. data-parallel ranks, one group each, with AdamW. Its seconds are the processor
seconds of one rank, mean over ranks, and its memory the peak of the first one and the bytes that it holds between
steps. Ranks may share a processor, because processor seconds count work and no waiting. Work per rank is the same for
every number of ranks, so that an exponent of 0 is the best there is. What ZeRO-3 sends over gloo is part of it.

An exponent is the slope of log(time) over log(size) between the two largest sizes: 1 is proportional, 2 is square.
The last lines:
    ratio growth_NAME        the exponent of the time
    ratio memory_NAME        the exponent of the memory
    ratio held_D             the exponent of the bytes that a rank holds between steps
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from typing import Iterator, NamedTuple

from tools.benchmarks.step_material import (
    PROJECT,
    SCALES,
    Clock,
    make_update,
    open_scaled,
    start,
    versions,
)


class Sizes(NamedTuple):
    """Sizes of an update."""

    visual: int = 1024
    length: int = 128
    group: int = 8
    micro_batches: int = 1


def series(largest: int) -> Iterator[tuple[str, list[Sizes]]]:
    """Yield the name of a size, and the sizes of its updates."""
    yield "P", [Sizes(visual=size) for size in (512, 1024, 2048, 4096, 8192) if size <= largest]
    yield "R", [Sizes(length=size) for size in (64, 128, 256, 512)]
    yield "G", [Sizes(group=size) for size in (4, 8, 16, 32)]
    yield "M", [Sizes(micro_batches=size) for size in (1, 2, 4)]


def exponent(sizes: list[int], values: list[float]) -> float:
    """Return the slope of log(value) over log(size) between the last two."""
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def run_rank(arguments: argparse.Namespace) -> None:
    """Measure updates as one data-parallel rank. The first rank prints the mean over ranks as a JSON line."""
    process_groups = start(arguments.threads)

    import torch

    from megatron_ral.parallel.collectives import all_reduce_sum_
    from megatron_ral.parallel.process_groups import stop_groups
    from megatron_ral.planning.fakes import Watched

    ranks, seconds, sizes = process_groups.layout.data_size, [], Sizes()
    policy, objective = open_scaled(arguments.as_rank, arguments.scale, arguments.layers, process_groups)
    batches = make_update(policy, torch.tensor([sizes.visual + 40]), torch.full((1, sizes.group), sizes.length))
    for number in range(arguments.rounds + 1):
        started = time.process_time()
        policy.forward_backward(batches, objective)
        assert policy.step().applied
        if number:
            seconds.append(time.process_time() - started)
    layers = policy.local_layers(sorted(objective.recorded_layers))
    with policy.ready(layers), Watched() as watched, watched.phase() as seen:
        policy.forward_backward(batches, objective)
    total = all_reduce_sum_(torch.tensor(sorted(seconds)[len(seconds) // 2]), process_groups.data)
    held = policy.shard_bytes()
    if process_groups.layout.rank == 0:
        found = {
            "seconds": float(total) / ranks,
            "peak": seen.peak_bytes,
            "held": sum(held.values()) - held["whole stage"],
        }
        print(json.dumps({**found, "tokens": batches[0].groups.num_tokens}), flush=True)
    stop_groups()


def grow_ranks(arguments: argparse.Namespace, folder: str) -> Iterator[tuple[str, float]]:
    """Measure the series D on the model in a folder, print its rows and yield its ratios."""
    found = []
    for ranks in arguments.ranks:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
                *("-m", "tools.benchmarks.growth", "--as-rank", folder, "--scale", str(arguments.scale)),
                *("--layers", str(arguments.layers), "--rounds", str(arguments.rounds)),
                *("--threads", str(arguments.threads)),
            ],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(arguments.threads)},
        )
        if done.returncode:
            sys.exit(f"{ranks} data-parallel ranks failed:\n{done.stderr[-4000:]}")
        one = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
        found.append(one)
        print(
            f"D={ranks}{one['tokens']:>{25 - len(str(ranks))},}{one['seconds']:>9.2f}"
            f"{1e6 * one['seconds'] / one['tokens']:>10.0f}{one['peak'] / 1e6:>9.0f}  "
            f"{one['held'] / 1e6:.0f} MB held between steps",
            flush=True,
        )
    for name, key in (("growth_D", "seconds"), ("memory_D", "peak"), ("held_D", "held")):
        yield name, exponent(arguments.ranks, [one[key] for one in found])


def main() -> None:
    """Measure every size and print the table and the exponents."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--scale", type=int, choices=SCALES, default=4, help="divisor of the widths of the 7B model")
    parser.add_argument("--layers", type=int, default=2, help="layers")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each size")
    parser.add_argument("--threads", type=int, default=1, help="threads")
    parser.add_argument("--largest", type=int, default=8192, help="largest number of visual tokens")
    parser.add_argument("--series", nargs="+", choices="PRGMD", default=list("PRGMD"), help="sizes that grow")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of data-parallel ranks of D")
    parser.add_argument("--as-rank", default="", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank:
        run_rank(arguments)
        return
    process_groups = start(arguments.threads)

    import torch

    from megatron_ral.parallel.process_groups import stop_groups
    from megatron_ral.planning.fakes import Watched

    clock, peaks, ratios = Clock(), {}, []
    with tempfile.TemporaryDirectory() as folder:
        policy, objective = open_scaled(folder, arguments.scale, arguments.layers, process_groups)

        def update(sizes: Sizes) -> list:
            count = sizes.micro_batches
            prompts = torch.full((count,), sizes.visual + 40)
            return make_update(policy, prompts, torch.full((count, sizes.group), sizes.length))

        print(f"{versions()}, {arguments.threads} thread(s), {arguments.layers} layers")
        print(
            f"{'':<3}{'P':>6}{'R':>6}{'G':>4}{'M':>4}{'tokens':>9}{'cpu s':>9}{'us/token':>10}{'peak MB':>9}",
            flush=True,
        )
        policy.forward_backward(update(Sizes()), objective)  # the first one takes memory and loads code
        for name, updates in series(arguments.largest):
            if name not in arguments.series:
                continue
            seconds, memory = [], []
            for sizes in updates:
                batches = update(sizes)
                key = str(sizes)
                for _ in range(arguments.rounds):
                    with clock.measure(key):
                        policy.forward_backward(batches, objective)
                if key not in peaks:
                    layers = policy.local_layers(sorted(objective.recorded_layers))
                    with policy.ready(layers), Watched() as watched, watched.phase() as seen:
                        policy.forward_backward(batches, objective)
                    peaks[key] = seen.peak_bytes
                count = sum(batch.groups.num_tokens for batch in batches)
                seconds.append(clock.median(key, "cpu"))
                memory.append(float(peaks[key]))
                print(
                    f"{name:<3}{sizes.visual:>6}{sizes.length:>6}{sizes.group:>4}{sizes.micro_batches:>4}{count:>9,}"
                    f"{seconds[-1]:>9.2f}{1e6 * seconds[-1] / count:>10.0f}{peaks[key] / 1e6:>9.0f}",
                    flush=True,
                )
            own = {"P": "visual", "R": "length", "G": "group", "M": "micro_batches"}[name]
            grown = [getattr(sizes, own) for sizes in updates]
            ratios.append((f"growth_{name}", exponent(grown, seconds)))
            ratios.append((f"memory_{name}", exponent(grown, memory)))
        if "D" in arguments.series:
            del policy, objective
            ratios.extend(grow_ranks(arguments, folder))
    stop_groups()
    for name, value in ratios:
        print(f"ratio {name} {value:.2f}")


if __name__ == "__main__":
    main()
