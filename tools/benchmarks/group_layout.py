"""Group layout [prompt | response 1 | ... | response G] against G separate sequences, in one process.

Code, weights, responses and loss are the same on both sides.

    python -m tools.benchmarks.group_layout [--scale 4] [--layers 2] [--rounds 3] [--threads 1]

Separate sequences are groups of one response for the same engine: one micro-batch of G prompts, the same prompt G
times, with one response each. The sides take turns. For one group, two things are timed: the gradients of one update,
and the pass without gradient that computes the old (or the reference's) log-probabilities. Both read visual embeddings
that exist already, so that no vision tower runs. The objective is GRPO without recorded attention, because the
attention term is over the same number of response rows on both sides. AdamW is left out: it is the same on both sides,
and runs once per 16 groups in the published runs.

The widths are those of Qwen2.5-VL-7B divided by --scale (see step_material.py). The vocabulary is reduced further to
--layers / 28, because the LM head reads response rows only and gains nothing from the layout. With the whole vocabulary
beside a few layers, it would hide the gain of the layers. The linear parts of a layer read P + G R tokens instead of
G (P + R). Attention over the prompt falls to 1 / G, attention over the responses stays.

Both sides must give the same gradient; the difference is printed. Calls of the vision tower are counted over the
rollout of --prompts prompts, the old pass and the update. Ratios use processor seconds of all threads, medians of
--rounds; wall seconds are printed beside them. The last lines:
    ratio group_layout_tower    pictures that the tower encodes in all of that, per prompt
    ratio group_layout_old      speed-up of the old pass over the token ratio G (P + R) / (P + G R)
    ratio group_layout          speed-up of the update over the token ratio
"""

import argparse
import os
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Iterator

from tools.benchmarks.step_material import (
    REAL,
    REAL_LAYERS,
    SCALES,
    Clock,
    make_model,
    make_prompts,
    open_processor,
    settings_of,
    start,
    versions,
    with_advantages,
)


@contextmanager
def counted(tower) -> Iterator[list[int]]:
    """Count [calls, pictures] of the vision tower in the code inside."""
    counts, forward = [0, 0], tower.forward

    def count(pixels, grid_thw, **options):
        counts[0] += 1
        counts[1] += int(grid_thw[:, 0].sum())  # pictures of one size stand as frames of one video
        return forward(pixels, grid_thw=grid_thw, **options)

    tower.forward = count
    try:
        yield counts
    finally:
        tower.forward = forward


def separate(scored, pad_token_id: int):
    """Return the G responses of one group as G groups of one response."""
    from megatron_ral.types import GroupBatch, pad_prompts

    groups = scored.groups
    [prompt], G = groups.prompts.prompts, groups.response_ids.shape[1]
    batch = GroupBatch(
        pad_prompts([prompt] * G, pad_token_id),
        groups.response_ids.transpose(0, 1),
        groups.response_lengths.transpose(0, 1),
        groups.visual_embeds * G,
    )
    return replace(scored, groups=batch, advantages=scored.advantages.transpose(0, 1))


class Bench:
    """Engine with the steps of both sides."""

    def __init__(self, args: argparse.Namespace, folder: Path, process_groups, clock: Clock):
        from megatron_ral.models.shape import read_shape
        from megatron_ral.training.build import build_objective, build_policy

        self.process_groups, self.clock = process_groups, clock
        model = make_model(folder, args.scale, args.layers, args.vocab_size)
        self.config = settings_of(
            "grpo_7b",
            model,
            [
                f"rollout.num_prompts={args.prompts}",
                f"rollout.group_size={args.group_size}",
                f"rollout.max_response_length={args.length}",
                "rollout.generation_batch_size=1",
            ],
        )
        self.processor, shape = open_processor(model), read_shape(model)
        self.prompts = make_prompts(self.processor, args.prompts, args.prompt_length)
        self.policy = build_policy(self.config, shape, process_groups)
        self.objective = build_objective(self.config, shape, process_groups).without("attention")

    def step(self, name: str, rollout: list) -> None:
        """Run the old pass and the gradients of these micro-batches."""
        import torch

        from megatron_ral.rollout.assemble import global_totals
        from megatron_ral.training.gradients import accumulate_gradients
        from megatron_ral.types import RlBatch

        batches = [scored.groups for scored in rollout]
        with self.clock.measure(f"{name} old"):
            old = self.policy.forward(batches)
        totals = global_totals(
            [batch.response_lengths for batch in batches], self.config.rollout.max_response_length, self.process_groups
        )
        minibatch = [
            RlBatch(
                groups=scored.groups,
                totals=totals,
                group_mask=torch.ones(len(scored.groups), dtype=torch.bool),
                advantages=scored.advantages,
                attention_advantages=scored.advantages,
                rollout_logprobs=scored.rollout_logprobs,
                from_teacher=scored.from_teacher,
                is_on_policy=False,
                compares_sampler=False,
                old_logprobs=output.tokens.logprobs,
            )
            for scored, output in zip(rollout, old)
        ]
        with self.clock.measure(f"{name} update"), self.policy.ready():
            accumulate_gradients(self.policy, minibatch, self.objective, self.config.num_optimizer_steps, False)

    def difference(self, sides: dict[str, list]) -> float:
        """Return |gradient of one side - gradient of the other| / |gradient|."""
        found = []
        for name, rollout in sides.items():
            self.step(name, rollout)
            found.append(self.policy.gradient_shards())
        norm = self.policy.gradient_norm
        return norm([one - other for one, other in zip(*found)]) / norm(found[1])

    def rollout(self) -> tuple[list, list[int]]:
        """Run a rollout and a step on it; returns its micro-batches, and [calls, pictures] of the vision tower."""
        from megatron_ral.rollout.collect import collect_rollout
        from megatron_ral.rollout.lengths import MicroBatchSettings
        from megatron_ral.rollout.native_sampler import NativeSampler
        from megatron_ral.rollout.settings import RolloutSettings

        sampler, settings = NativeSampler(self.policy), RolloutSettings.from_config(self.config)
        with counted(self.policy.stage.visual) as counts:
            rollout = collect_rollout(
                self.policy, sampler, self.prompts, self.processor, settings, 0, MicroBatchSettings(1)
            ).batches
            found = with_advantages(rollout)
            self.step("whole", found)
        return found, counts


def main() -> None:
    """Measure all sides and print the table and the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--scale", type=int, choices=SCALES, default=4, help="divisor of the 7B's widths")
    parser.add_argument("--layers", type=int, default=2, help="layers of the language model")
    parser.add_argument("--vocab-size", type=int, default=0, help="0: the 7B's / scale * layers / 28")
    parser.add_argument("--prompts", type=int, default=3, help="prompts of the rollout; the first one's group is timed")
    parser.add_argument("--prompt-length", type=int, default=1024, help="P: tokens of a prompt, nearly all visual")
    parser.add_argument("--group-size", type=int, default=8, help="G: responses to each prompt")
    parser.add_argument("--length", type=int, default=128, help="R: tokens of a response")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side, and one more")
    parser.add_argument("--threads", type=int, default=1, help="threads of the process")
    args = parser.parse_args()
    if min(args.layers, args.prompts, args.rounds, args.threads) < 1 or args.group_size < 2:
        parser.error("--layers, --prompts, --rounds and --threads must be at least 1, --group-size at least 2")
    args.vocab_size = args.vocab_size or max(REAL["vocab_size"] // args.scale * args.layers // REAL_LAYERS, 512)
    P, G, R = args.prompt_length, args.group_size, args.length
    tokens = P + G * R, G * (P + R)
    process_groups, clock = start(args.threads), Clock()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder) / "model", process_groups, clock)
        print(
            f"Qwen2.5-VL-7B / {args.scale}: hidden {REAL['hidden_size'] // args.scale}, {args.layers} layers, "
            f"vocabulary {args.vocab_size}, float32; P = {P}, G = {G}, R = {R}"
        )
        print(
            f"{versions()}; {args.threads} threads, {len(os.sched_getaffinity(0))} cores; processor seconds, median "
            f"of {args.rounds}",
            flush=True,
        )
        found, (calls, pictures) = bench.rollout()
        sides = {"group": found[:1], "separate": [separate(found[0], bench.processor.pad_token_id)]}
        difference = bench.difference(sides)  # the first time, which is not measured
        clock.clear()
        for _ in range(args.rounds):  # sides take turns, so that noise affects both
            for name, rollout in sides.items():
                bench.step(name, rollout)
        print(f"{'':10}{'tokens':>8}{'old pass, s':>13}{'update, s':>11}{'wall: old pass, s':>20}{'update, s':>11}")
        for (name, _), count in zip(sides.items(), tokens):
            seconds = [clock.median(f"{name} {part}", kind) for kind in ("cpu", "wall") for part in ("old", "update")]
            print(f"{name:10}{count:8}{seconds[0]:13.3f}{seconds[1]:11.3f}{seconds[2]:20.3f}{seconds[3]:11.3f}")
        ratio = tokens[1] / tokens[0]
        print(f"gradients of both sides differ by {difference:.1e} of their norm")
        print(
            f"vision tower, over rollout, old pass and update of {args.prompts} prompts with {G} responses each: "
            f"{calls} calls, {pictures} pictures"
        )
        speed = {
            part: clock.median(f"separate {part}", "cpu") / clock.median(f"group {part}", "cpu")
            for part in ("old", "update")
        }
        print(
            f"token ratio {ratio:.2f}; speed-up of the old pass {speed['old']:.2f}, of the update {speed['update']:.2f}"
        )
        print(f"ratio group_layout_tower {pictures / args.prompts:.2f}")
        print(f"ratio group_layout_old {speed['old'] / ratio:.3f}")
        print(f"ratio group_layout {speed['update'] / ratio:.3f}")
    from megatron_ral.parallel.process_groups import stop_groups

    stop_groups()


if __name__ == "__main__":
    main()
