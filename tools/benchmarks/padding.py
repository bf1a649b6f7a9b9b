"""Update on responses and prompts of different lengths, against the same number of tokens in equal lengths.

    python -m tools.benchmarks.padding [--scale 4] [--layers 2] [--groups 8] [--rounds 3] [--threads 1]

Lengths look like those of real runs: tokens of a response are log-normal around 150 (sigma 0.7), at most 512; prompts
are log-normal around 700 (sigma 0.5), between 200 and 2,000, all but 40 of them visual. The same lengths are drawn in
every run. The widths are those of Qwen2.5-VL-7B divided by --scale, and the vocabulary is its share by widths and
layers (see group_layout.py). Visual embeddings exist already, so that no vision tower runs. The update is the gradient
of GRPO with the attention term of the last layer; AdamW is left out. Four sides take turns:

    equal        as many groups, and as many useful tokens of prompts and of responses, all groups alike
    different    the drawn lengths, in micro-batches of --tokens tokens
    by groups    the drawn lengths, in micro-batches of one group
    padded       every response as long as the longest of its micro-batch of one group, which is what an update
                 computes that pads responses

Sides use processor seconds of all threads, medians of --rounds; wall seconds are printed beside them. The last lines:
    ratio padding            different / equal
    ratio padding_by_groups  by groups / equal
    ratio padding_before     padded / equal
"""

import argparse
import tempfile

from tools.benchmarks.step_material import (
    SCALES,
    Clock,
    make_update,
    open_scaled,
    start,
    versions,
)

RESPONSES, PROMPTS = (150, 0.7, 1, 512), (700, 0.5, 200, 2000)
"""Median, sigma, least and largest tokens."""


def draw_lengths(count: int, kind: tuple[float, float, int, int], generator):
    """Return lengths from a log-normal distribution that is cut at both ends, [count] int64."""
    import torch

    median, sigma, least, largest = kind
    drawn = (torch.randn(count, generator=generator) * sigma).exp() * median
    return drawn.round().long().clamp(least, largest)


def main() -> None:
    """Measure all sides and print the table and the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--scale", type=int, choices=SCALES, default=4, help="divisor of the widths of the 7B model")
    parser.add_argument("--layers", type=int, default=2, help="layers")
    parser.add_argument("--groups", type=int, default=8, help="prompt groups of the update")
    parser.add_argument("--group-size", type=int, default=8, help="responses to each prompt")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a micro-batch")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    parser.add_argument("--threads", type=int, default=1, help="threads")
    arguments = parser.parse_args()
    process_groups = start(arguments.threads)

    import torch

    from megatron_ral.parallel.process_groups import stop_groups

    generator = torch.Generator().manual_seed(0)
    groups, G = arguments.groups, arguments.group_size
    prompts = draw_lengths(groups, PROMPTS, generator)
    responses = draw_lengths(groups * G, RESPONSES, generator).view(groups, G)
    longest = responses.amax(dim=1, keepdim=True).expand(-1, G)
    even = (
        _shared(int(prompts.sum()), groups),
        _shared(int(responses.sum()), groups * G).view(groups, G),
    )
    with tempfile.TemporaryDirectory() as folder:
        policy, objective = open_scaled(folder, arguments.scale, arguments.layers, process_groups)
        sides = {
            "equal": make_update(policy, *even, arguments.tokens),
            "different": make_update(policy, prompts, responses, arguments.tokens),
            "by groups": make_update(policy, prompts, responses),
            "padded": make_update(policy, prompts, longest),
        }
        clock = Clock()
        for turn in range(arguments.rounds + 1):
            for name, side in sides.items():
                with clock.measure(name):
                    policy.forward_backward(side, objective)
            if turn == 0:
                clock.clear()
    stop_groups()
    print(f"{versions()}, {arguments.threads} thread(s), {arguments.layers} layers, {groups} groups of {G}")
    print(
        f"prompts of {int(prompts.min())} to {int(prompts.max())} tokens, responses of {int(responses.min())} to "
        f"{int(responses.max())}; {int(prompts.sum() + responses.sum()):,} tokens, padded "
        f"{int(prompts.sum() + longest.sum()):,}"
    )
    print(f"{'':<12}{'micro-batches':>14}{'tokens':>10}{'cpu s':>9}{'wall s':>9}")
    for name, side in sides.items():
        seconds = "".join(f"{clock.median(name, kind):>9.2f}" for kind in ("cpu", "wall"))
        count = sum(batch.groups.num_tokens for batch in side)
        print(f"{name:<12}{len(side):>14}{count:>10,}{seconds}")
    for name, side in (("padding", "different"), ("padding_by_groups", "by groups"), ("padding_before", "padded")):
        print(f"ratio {name} {clock.median(side, 'cpu') / clock.median('equal', 'cpu'):.3f}")


def _shared(total: int, count: int):
    """Return `count` numbers that add up to `total` and differ by at most 1."""
    import torch

    share = torch.full((count,), total // count)
    share[: total % count] += 1
    return share


if __name__ == "__main__":
    main()
