"""Time of a RAL step over that of a GRPO step, with the same code, weights and rollouts, in one process.

    python -m tools.benchmarks.ral_over_grpo [--scale 4] [--layers 1 2] [--rounds 3] [--threads 1] [--rollouts 2]

A step is the pass for the old log-probabilities and the gradients of one update. The sides take turns:

    grpo            grpo_7b.yaml: coefficient 0; the term of the last layer is still computed for the log
    bare grpo       the same without recorded attention, which no setting gives: it shows the cost of logging
    ral             ral_7b.yaml: one recorded layer
    ral all layers  ral_7b.yaml with every layer recorded
    contrast        ral_explored_7b.yaml: one layer, whose explored rows decoding recorded, so that no pass records them
    contrast two    the same on two layers

Widths and vocabulary are those of Qwen2.5-VL-7B divided by --scale (see step_material.py). The term falls with the
number of heads and therefore weighs --scale times more against the layers than in the 7B. Three things are not part of
a step here. The reference pass and AdamW are the same on both sides and would lower the ratio (AdamW is printed; it
runs once per 16 groups in the published runs). Recomputed activations would favour RAL, because recorded layers are not
recomputed. All responses have the full length.

A machine without an accelerator holds a few layers, beside which one recorded layer weighs far more than beside 28.
Each side is therefore timed at two depths, and the formula

    step(L, recorded) = fixed + L * layer + recorded * term

is solved. `layer` and `fixed` come from bare GRPO at both depths. `term` (recording in the old pass, rows of both
passes, divergence, metrics, backward pass) is the additional time of a side per recorded layer, mean of both depths.
`measured` is the term of GRPO, which computes no gradient. `fixed` is mostly the LM head, whose share is that beside 28
layers. Printed are the ratios at the timed depths and, by this formula, at 28 layers. The ratio with the rollout
includes generation and rewards, which are the same on both sides. Its vision tower is tiny, so that the rollout is too
cheap.

Ratios use processor seconds of all threads, because the machine may do other work; they are medians of --rounds. Wall
seconds are printed beside them. A rollout with noise has it in all layers and records the rows of two at most. The last
lines, for 28 layers:
    ratio ral_over_grpo_bare               ral over bare grpo
    ratio ral_over_grpo_with_rollout       ral over grpo, rollout included
    ratio ral_over_grpo_all_layers_bare    ral all layers over bare grpo
    ratio ral_over_grpo_all_layers         ral all layers over grpo
    ratio noise_over_plain_rollout         rollout with noise in all layers over one without
    ratio contrast_over_grpo               contrast over grpo, step alone
    ratio contrast_two_over_grpo           contrast on two layers over grpo, step alone
    ratio contrast_over_grpo_with_rollout  contrast over grpo, rollout included
    ratio ral_over_grpo                    ral over grpo
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

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

SIDES = ("grpo", "bare grpo", "ral", "contrast", "ral all layers", "contrast two")


class Depth:
    """Engine of a number of layers, its rollout and the four steps on it."""

    def __init__(self, num_layers: int, args: argparse.Namespace, folder: Path, process_groups, clock: Clock):
        from megatron_ral.models.shape import read_shape
        from megatron_ral.training.build import build_objective, build_policy

        self.num_layers, self.process_groups, self.clock = num_layers, process_groups, clock
        self.sides = SIDES if num_layers > 1 else SIDES[:4]  # with one layer, all layers are one layer
        model = make_model(folder / f"{num_layers}", args.scale, num_layers, args.vocab_size)
        lengths = [
            f"rollout.num_prompts={args.prompts}",
            f"rollout.group_size={args.group_size}",
            f"rollout.max_response_length={args.length}",
        ]
        self.processor = open_processor(model)
        self.prompts = make_prompts(self.processor, args.prompts, args.prompt_length)
        every = [*lengths, f"loss.attention_layers={list(range(num_layers))}"]
        grids = settings_of("ral_explored_7b", model, []).rollout.attention_noise.grids
        explored = [*lengths, f"rollout.attention_noise.grids={list(grids[: args.group_size])}"]  # a small group
        self.configs = {
            "grpo": settings_of("grpo_7b", model, lengths),
            "ral": settings_of("ral_7b", model, lengths),
            "ral all layers": settings_of("ral_7b", model, every),
            "contrast": settings_of("ral_explored_7b", model, [*explored, "loss.attention_layers=[-1]"]),
        }
        if num_layers > 1:
            self.configs["contrast two"] = settings_of(
                "ral_explored_7b", model, [*explored, "loss.attention_layers=[-2,-1]"]
            )
        self.configs["bare grpo"] = self.configs["grpo"]
        shape = read_shape(model)
        self.policy = build_policy(self.configs["grpo"], shape, process_groups)
        self.objectives = {
            name: build_objective(config, shape, process_groups, None) for name, config in self.configs.items()
        }
        self.objectives["bare grpo"] = self.objectives["grpo"].without("attention")
        self.num_parameters = sum(parameter.ds_numel for parameter in self.policy.stage.parameters())
        self.rollouts, self.old = {}, {}

    def sample(self) -> None:
        """Sample rollouts without noise and with it. All steps use the first ones."""
        from megatron_ral.rollout.collect import collect_rollout
        from megatron_ral.rollout.lengths import MicroBatchSettings
        from megatron_ral.rollout.native_sampler import NativeSampler
        from megatron_ral.rollout.settings import RolloutSettings

        for name, side in (("rollout", "grpo"), ("noisy rollout", self.sides[-1])):  # the last records most layers
            with self.clock.measure(f"{self.num_layers} {name}"):
                settings = RolloutSettings.from_config(self.configs[side])
                sampler = NativeSampler(self.policy)
                rollout = collect_rollout(
                    self.policy, sampler, self.prompts, self.processor, settings, 0, MicroBatchSettings(1)
                ).batches
            self.rollouts.setdefault(name, with_advantages(rollout))

    def step(self, side: str) -> None:
        """Run the part of `rl_step` after the rollout, for a later minibatch, because the first needs no old pass."""
        from megatron_ral.attention.targets.registry import TargetPass
        from megatron_ral.rollout.assemble import assemble_minibatches
        from megatron_ral.training.gradients import accumulate_gradients

        config, objective, policy = self.configs[side], self.objectives[side], self.policy
        term = objective.term("attention") or self.objectives["grpo"].term("attention")
        rollout = self.rollouts["noisy rollout" if side.startswith("contrast") else "rollout"]
        batches = [scored.groups for scored in rollout]
        recorded = sorted(objective.recorded_layers) if term.target_pass is TargetPass.ROLLOUT_POLICY else []
        with self.clock.measure(f"{self.num_layers} {side}"):
            with self.clock.measure(f"{self.num_layers} {side} old"):
                old = policy.forward(batches, recorded, store=term.store)
            before = self.old.get(side, old)  # off policy except in the first round, because AdamW ran in between
            [minibatch] = assemble_minibatches(
                rollout,
                before,
                None,
                before,
                term,
                num_minibatches=config.rollout.num_minibatches,
                max_response_length=config.rollout.max_response_length,
                process_groups=self.process_groups,
            )
            self.old[side] = old
            with self.clock.measure(f"{self.num_layers} {side} gradients"), policy.ready():
                accumulate_gradients(policy, minibatch, objective, config.num_optimizer_steps, False)

    def move(self) -> None:
        """Run AdamW with the present gradient."""
        with self.clock.measure(f"{self.num_layers} adamw"):
            result = self.policy.step()
        if not result.applied:
            sys.exit(f"{self.num_layers} layers: the gradient was not finite")


def report(depths: list[Depth], clock: Clock) -> None:
    """Print the tables, the parts of the formula, and the ratios."""
    print(
        f"{'':16}{'layers':>8}{'old pass, s':>13}{'gradients, s':>14}{'step, s':>10}{'over grpo':>11}"
        f"{'step on the wall, s':>21}"
    )
    for depth in depths:
        L = depth.num_layers
        for side in depth.sides:
            old, gradients, step = (clock.median(f"{L} {side}{part}", "cpu") for part in (" old", " gradients", ""))
            ratio = step / clock.median(f"{L} grpo", "cpu")
            print(
                f"{side:16}{L:8}{old:13.3f}{gradients:14.3f}{step:10.3f}{ratio:11.3f}"
                f"{clock.median(f'{L} {side}', 'wall'):21.3f}"
            )
        for name in ("adamw", "rollout", "noisy rollout"):
            print(
                f"{name:16}{L:8}{'':27}{clock.median(f'{L} {name}', 'cpu'):10.3f}{'':11}"
                f"{clock.median(f'{L} {name}', 'wall'):21.3f}"
            )
    few, many = (depth.num_layers for depth in depths)

    def line(name: str) -> tuple[float, float]:
        """Return (seconds without layers, seconds per layer)."""
        low, high = (clock.median(f"{L} {name}", "cpu") for L in (few, many))
        slope = (high - low) / (many - few)
        return low - few * slope, slope

    def more(side: str, recorded, otherwise: str = "ral") -> float:
        """Return the seconds per recorded layer above bare GRPO, mean of both depths.

        Args:
            side: side of the step.
            recorded: number of layers -> number of them that the side records.
            otherwise: side that stands in at a depth that does not have `side`.
        """
        sides = {depth.num_layers: side if side in depth.sides else otherwise for depth in depths}
        return (
            sum(
                (clock.median(f"{L} {name}", "cpu") - clock.median(f"{L} bare grpo", "cpu")) / recorded(L)
                for L, name in sides.items()
            )
            / 2
        )

    fixed, layer = line("bare grpo")
    first, decoding = line("rollout")
    first_noisy, decoding_noisy = line("noisy rollout")
    terms = {
        "grpo": more("grpo", lambda L: 1),
        "ral": more("ral", lambda L: 1),
        "ral all layers": more("ral all layers", lambda L: L),
        "contrast": more("contrast", lambda L: 1),
        "contrast two": more("contrast two", lambda L: min(L, 2), "contrast"),
    }
    print(
        f"step(L, recorded) = fixed + L * layer + recorded * term, processor seconds: fixed {fixed:.3f}, layer "
        f"{layer:.3f}, term {terms['ral']:.3f} (one layer), {terms['ral all layers']:.3f} (each of all), measured "
        f"{terms['grpo']:.3f}; rollout(L) = {first:.3f} + L * {decoding:.3f}"
    )
    bare = fixed + REAL_LAYERS * layer
    grpo, one, every = bare + terms["grpo"], bare + terms["ral"], bare + REAL_LAYERS * terms["ral all layers"]
    rollout = first + REAL_LAYERS * decoding
    print(
        f"at {REAL_LAYERS} layers: bare grpo {bare:.2f} s, grpo {grpo:.2f} s, ral {one:.2f} s, ral all layers "
        f"{every:.2f} s, rollout {rollout:.2f} s"
    )
    print(f"ratio ral_over_grpo_bare {one / bare:.3f}")
    print(f"ratio ral_over_grpo_with_rollout {(rollout + one) / (rollout + grpo):.3f}")
    print(f"ratio ral_over_grpo_all_layers_bare {every / bare:.3f}")
    print(f"ratio ral_over_grpo_all_layers {every / grpo:.3f}")
    noisy = first_noisy + REAL_LAYERS * decoding_noisy
    contrast, two = bare + terms["contrast"], bare + 2 * terms["contrast two"]
    print(f"ratio noise_over_plain_rollout {noisy / rollout:.3f}")
    print(f"ratio contrast_over_grpo {contrast / grpo:.3f}")
    print(f"ratio contrast_two_over_grpo {two / grpo:.3f}")
    print(f"ratio contrast_over_grpo_with_rollout {(noisy + contrast) / (rollout + grpo):.3f}")
    print(f"ratio ral_over_grpo {one / grpo:.3f}")


def main() -> None:
    """Measure all sides and print the table and the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--scale", type=int, choices=SCALES, default=4, help="divisor of the 7B's widths")
    parser.add_argument("--layers", type=int, nargs=2, default=[1, 2], help="two depths to time")
    parser.add_argument("--vocab-size", type=int, default=0, help="0: the 7B's / scale")
    parser.add_argument("--prompts", type=int, default=1, help="prompt groups of a step, one per micro-batch")
    parser.add_argument("--prompt-length", type=int, default=1024, help="tokens of a prompt, nearly all of them visual")
    parser.add_argument("--group-size", type=int, default=8, help="responses to each prompt")
    parser.add_argument("--length", type=int, default=128, help="tokens of a response")
    parser.add_argument("--rounds", type=int, default=3, help="steps of every side at each depth, and one more")
    parser.add_argument("--rollouts", type=int, default=2, help="rollouts at each depth, at most --rounds; one more")
    parser.add_argument("--threads", type=int, default=1, help="threads of the process")
    args = parser.parse_args()
    args.layers.sort()
    if args.layers[0] < 1 or args.layers[0] == args.layers[1]:
        parser.error(f"--layers must be two depths of at least one layer, got {args.layers}")
    if args.rounds < 1 or args.rollouts < 1 or args.prompts < 1 or args.group_size < 2:
        parser.error("--rounds, --rollouts and --prompts must be at least 1, --group-size at least 2")
    args.vocab_size = args.vocab_size or REAL["vocab_size"] // args.scale
    process_groups, clock = start(args.threads), Clock()
    with tempfile.TemporaryDirectory() as folder:
        depths = [Depth(L, args, Path(folder), process_groups, clock) for L in args.layers]
        sizes = [f"{depth.num_layers} layers with {depth.num_parameters / 1e6:.1f} M parameters" for depth in depths]
        print(
            f"Qwen2.5-VL-7B / {args.scale}: hidden {REAL['hidden_size'] // args.scale}, vocabulary "
            f"{args.vocab_size}; {' and '.join(sizes)}, float32; {args.prompts} prompts, P = {args.prompt_length}, "
            f"G = {args.group_size}, R = {args.length}"
        )
        print(
            f"{versions()}; {args.threads} threads, {len(os.sched_getaffinity(0))} cores; processor seconds, median "
            f"of {args.rounds}",
            flush=True,
        )
        for number in range(args.rounds + 1):  # the first is not measured; sides take turns, so that noise affects all
            if number == 1:
                clock.clear()
            for depth in depths:
                if number <= args.rollouts:
                    depth.sample()
                for side in depth.sides:
                    depth.step(side)
                depth.move()
        report(depths, clock)
    from megatron_ral.parallel.process_groups import stop_groups

    stop_groups()


if __name__ == "__main__":
    main()
