"""Time and memory of an update as work grows, with the exponent of each.

    python -m tools.benchmarks.growth [--scale 4] [--layers 2] [--rounds 2] [--largest 8192] [--series P R G M]

One size is doubled while the others stay: visual tokens P of a prompt, tokens R of a response, responses G, and
micro-batches M (updates of more groups, one group each). The update is the gradient of GRPO with the attention term of
the last layer; AdamW is left out, which does not depend on them. The model is that of padding.py. Memory is the peak of
live bytes of the processor's tensors above parameters, gradients and inputs, counted in an update of its own.

Between data-parallel ranks: gradients and the gathered stage are sent once per update, whatever the number of ranks
(`python -m tools.benchmarks.traffic`), so that this table has one process.

An exponent is the slope of log(time) over log(size) between the two largest sizes: 1 is proportional, 2 is square.
The last lines:
    ratio growth_NAME        the exponent of the time
    ratio memory_NAME        the exponent of the memory
"""

import argparse
import math
import tempfile
from typing import Iterator, NamedTuple

from tools.benchmarks.step_material import (
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
    parser.add_argument("--series", nargs="+", choices="PRGM", default=list("PRGM"), help="sizes that grow")
    arguments = parser.parse_args()
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
    stop_groups()
    for name, value in ratios:
        print(f"ratio {name} {value:.2f}")


if __name__ == "__main__":
    main()
