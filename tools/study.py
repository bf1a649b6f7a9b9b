"""Compare RAL, its targets and its controls with GRPO on digit search, from the same supervised weights, over seeds.

    python tools/study.py --output-dir DIR [--seeds 0 1 2] [--grids 2 3] [--arms grpo old_1 ...] [--jobs 2]

Every arm of one seed and grid starts from the same SFT checkpoint (the arms without thinking from one of their own),
sees the same prompts in the same order and draws from the same random streams. Finished runs are not repeated, so that
the study can be stopped and continued. Arms with explored attention (contrast, noise) run where they are named. Writes
DIR/study.md (table: mean, standard error over seeds, paired difference from GRPO), DIR/study.json and PNG plots of
accuracy and target mass over rollouts.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_ral.demo import explored
from megatron_ral.demo.runs import beside, call, curve, draw_curves, mean_and_error, side_by_side, train_once

RATIO = (
    0.1  # |gradient of the attention term| / |gradient of the token terms|, where an arm does not give a coefficient
)


@dataclass(frozen=True)
class Arm:
    """One way to train from the supervised weights."""

    title: str
    settings: tuple[str, ...]
    zero: bool = False
    """Without thinking: supervised data and format without the think block."""
    on_request: bool = False
    """Run only where it is named: an arm with noise on the attention while sampling."""


def _arms() -> dict[str, Arm]:
    def target(name: str, *more: str) -> tuple[str, ...]:
        return (f"loss.attention_target={name}", *more)

    ratio = f"loss.attention_grad_ratio={RATIO}"
    acting = {
        "old_0.5": ("RAL, old, coefficient 0.5", target("old", "loss.attention_coef=0.5")),
        "old_1": ("RAL, old, coefficient 1", target("old", "loss.attention_coef=1.0")),
        "old_5": ("RAL, old, coefficient 5", target("old", "loss.attention_coef=5.0")),
        "old_ratio": (f"RAL, old, gradient ratio {RATIO}", target("old", ratio)),
        "reference": (f"RAL, reference, gradient ratio {RATIO}", target("reference", ratio)),
        "hindsight": (
            f"RAL, hindsight, gradient ratio {RATIO}",
            target("hindsight", "loss.attention_keys=visual", ratio),
        ),
    }
    arms = {"grpo": Arm("GRPO", ("loss.attention_coef=0.0",))}
    for name, (title, settings) in acting.items():
        arms[name] = Arm(title, settings)
        arms[f"{name}_shuffled"] = Arm(f"{title}, shuffled", (*settings, "loss.attention_advantages=shuffled"))
    arms["oracle"] = Arm(
        f"RAL, annotated box, gradient ratio {RATIO}", target("oracle", "loss.attention_keys=visual", ratio)
    )
    no_think = "reward.require_think=false"
    arms["grpo_zero"] = Arm("GRPO-zero", ("loss.attention_coef=0.0", no_think), zero=True)
    arms["ral_zero"] = Arm(
        "RAL-zero, old, coefficient 1", (*target("old", "loss.attention_coef=1.0"), no_think), zero=True
    )
    for name, of, title, *changed in (
        ("contrast", "contrast", "contrast of explored attention"),
        ("contrast_shuffled", "contrast_shuffled", "contrast of explored attention, shuffled"),
        ("noise", "noise", "noise alone"),
        ("contrast_4", "contrast", "contrast, sigma 4", "rollout.attention_noise.sigma=4.0"),
        ("contrast_lead", "contrast@lead=1", "contrast, sigma 1 of the lead"),
    ):
        settings = (*explored.ARMS[of].settings, "loss.attention_layers=[0,1,2,3]", *changed)
        arms[name] = Arm(title, settings, on_request=True)
    return arms


ARMS = _arms()
# Cells along a side -> options of the data, and samples of each stage of the cold start: single cells, search, biased
# gaze. Without thinking the search takes longer to learn (with the stages of "sft" it stays at chance).
GRIDS = {
    2: {"data": ("--grid", 2), "sft": (4800, 6400, 4800), "sft_zero": (9600, 19200, 3200)},
    3: {
        "data": ("--grid", 3, "--num-colours", 9, "--bias", 0.75, "--num-search", 9600),
        "sft": (4800, 9600, 4800),
        "sft_zero": (9600, 25600, 3200),
    },
}


@dataclass(frozen=True)
class Study:
    """Folder of one study, and the paths in it."""

    root: Path
    num_rollouts: int
    eval_interval: int

    def data(self, grid: int) -> Path:
        return self.root / f"grid_{grid}" / "data"

    def run(self, grid: int, seed: int, name: str) -> Path:
        return self.root / f"grid_{grid}" / f"seed_{seed}" / name

    def make_data(self, grid: int) -> None:
        if not (self.data(grid) / "dataset_info.json").is_file():
            call(
                self.data(grid).parent / "data.log",
                "tools/make_digit_search.py",
                "--output",
                self.data(grid),
                "--force",
                "--num-heldout",
                1024,
                *GRIDS[grid]["data"],
            )

    def model(self, grid: int, seed: int) -> None:
        model = self.run(grid, seed, "model")
        if not (model / "config.json").is_file():
            call(beside(model, ".log"), "tools/make_tiny_model.py", "--output", model, "--seed", seed)

    def cold_start(self, grid: int, seed: int, zero: bool) -> None:
        """Train this seed's model under supervision."""
        model, target = self.run(grid, seed, "model"), self.run(grid, seed, "sft_zero" if zero else "sft")
        single, search, biased = GRIDS[grid]["sft_zero" if zero else "sft"]
        data = ", ".join(
            f"{{shards: '{self.data(grid)}/{name}-*.tar', num_samples: {count}}}"
            for name, count in (("single", single), ("search", search), ("biased", biased))
        )
        train_once(
            "sft_tiny",
            model,
            target,
            seed,
            [
                f"data.eval_shards='{self.data(grid)}/heldout-*.tar'",
                f"data.train=[{data}]",
                f"train.num_steps={(single + search + biased) // 32}",
                "logging.eval_interval=0",
                f"data.include_process={str(not zero).lower()}",
            ],
        )

    def arm(self, grid: int, seed: int, name: str) -> None:
        start = self.run(grid, seed, "sft_zero" if ARMS[name].zero else "sft") / "hf"
        train_once(
            "ral_tiny",
            start,
            self.run(grid, seed, name),
            seed,
            [
                f"data.eval_shards='{self.data(grid)}/heldout-*.tar'",
                f"data.train=[{{shards: '{self.data(grid)}/rl-*.tar'}}]",
                f"train.num_steps={self.num_rollouts}",
                f"logging.eval_interval={self.eval_interval}",
                "logging.num_eval_prompts=1024",
                *ARMS[name].settings,
            ],
        )


def run_all(study: Study, grids: list[int], seeds: list[int], arms: list[str], jobs: int) -> None:
    for grid in grids:
        study.make_data(grid)
    starts = [
        (grid, seed, zero) for grid in grids for seed in seeds for zero in sorted({ARMS[name].zero for name in arms})
    ]
    runs = [(grid, seed, name) for seed in seeds for grid in grids for name in arms]
    models = [(grid, seed) for grid in grids for seed in seeds]
    side_by_side("models", study.model, models, jobs)
    side_by_side("cold starts", study.cold_start, starts, jobs)
    side_by_side("arms", study.arm, runs, jobs)


def results(study: Study, grids: list[int], seeds: list[int], arms: list[str]) -> dict:
    """Return the curves of all runs and the numbers of the table."""
    table, curves = {}, {}
    for grid in grids:
        curves[grid] = {
            name: {
                tag: [curve(study.run(grid, seed, name), f"eval/{tag}") for seed in seeds]
                for tag in ("accuracy", "target_attention")
            }
            for name in arms
        }
        rows = {}
        for name in arms:
            accuracy = [curve[-1][1] for curve in curves[grid][name]["accuracy"]]
            control = "grpo_zero" if ARMS[name].zero else "grpo"
            baseline = [curve[-1][1] for curve in curves[grid].get(control, {}).get("accuracy", [])]
            ratios = [
                value for seed in seeds for _, value in curve(study.run(grid, seed, name), "attention/grad_ratio")
            ]
            rows[name] = {
                "title": ARMS[name].title,
                "start": [curve[0][1] for curve in curves[grid][name]["accuracy"]],
                "accuracy": accuracy,
                "difference": [a - b for a, b in zip(accuracy, baseline)],
                "area": [statistics.fmean(value for _, value in curve[1:]) for curve in curves[grid][name]["accuracy"]],
                "target_mass": [curve[-1][1] for curve in curves[grid][name]["target_attention"]],
                "grad_ratio": statistics.median(ratios) if ratios else 0.0,
            }
        for row, name in ((row, name) for name, row in rows.items()):
            control = rows.get("grpo_zero" if ARMS[name].zero else "grpo")
            row["area_difference"] = [a - b for a, b in zip(row["area"], control["area"])] if control else []
        table[grid] = rows
    return {"seeds": seeds, "rollouts": study.num_rollouts, "table": table, "curves": curves}


def write_table(found: dict, path: Path) -> None:
    """Write the Markdown table, in points of accuracy on held-out prompts."""

    def points(values: list[float]) -> str:
        return "{:+.1f} +- {:.1f}".format(*(100 * value for value in mean_and_error(values))) if values else ""

    lines = []
    for grid, rows in found["table"].items():
        lines += [
            f"### {grid} x {grid} cells",
            "",
            "| arm | accuracy | difference from GRPO | mean over the run, difference | target mass | gradient ratio |",
            "|---|---|---|---|---|---|",
        ]
        for zero, title in ((False, "SFT"), (True, "SFT without thinking")):
            starts = next((row["start"] for name, row in rows.items() if ARMS[name].zero == zero), None)
            if starts:
                mean, error = mean_and_error(starts)
                lines.append(f"| {title} | {100 * mean:.1f} +- {100 * error:.1f} | | | | |")
        for row in rows.values():
            mean, error = mean_and_error(row["accuracy"])
            mass, _ = mean_and_error(row["target_mass"])
            lines.append(
                f"| {row['title']} | {100 * mean:.1f} +- {100 * error:.1f} | {points(row['difference'])} | "
                f"{points(row['area_difference'])} | {mass:.3f} | {row['grad_ratio']:.2g} |"
            )
        lines.append("")
    path.write_text("\n".join(lines))


def plot(found: dict, folder: Path) -> None:
    """Draw accuracy and target mass over rollouts, mean over seeds with its standard error; controls dotted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for tag, label in (
        ("accuracy", "held-out accuracy"),
        ("target_attention", "target mass / visual mass, last layer"),
    ):
        figure, axes = plt.subplots(1, len(found["curves"]), figsize=(8 * len(found["curves"]), 6), squeeze=False)
        for axis, (grid, arms) in zip(axes[0], found["curves"].items()):
            colours = {}
            for name, curves in arms.items():
                base = name.removesuffix("_shuffled")
                colour = colours.setdefault(base, plt.get_cmap("tab20")(len(colours) * 2 % 20))
                draw_curves(
                    axis, curves[tag], color=colour, linestyle=":" if name != base else "-", label=ARMS[name].title
                )
            axis.set(title=f"{grid} x {grid} cells", xlabel="rollouts", ylabel=label)
            axis.grid(alpha=0.3)
        axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
        figure.tight_layout()
        figure.savefig(folder / f"study_{tag}.png", dpi=90)
        plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--grids", type=int, nargs="+", default=[2, 3], choices=sorted(GRIDS))
    parser.add_argument(
        "--arms",
        nargs="+",
        default=[name for name, arm in ARMS.items() if not arm.on_request],
        choices=list(ARMS),
        metavar="ARM",
        help=f"of: {', '.join(ARMS)}",
    )
    parser.add_argument("--num-rollouts", type=int, default=24)
    parser.add_argument("--eval-interval", type=int, default=6, help="rollouts between evaluations")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, each on one core")
    arguments = parser.parse_args()
    study = Study(arguments.output_dir.absolute(), arguments.num_rollouts, arguments.eval_interval)
    run_all(study, arguments.grids, arguments.seeds, arguments.arms, arguments.jobs)
    found = results(study, arguments.grids, arguments.seeds, arguments.arms)
    (study.root / "study.json").write_text(json.dumps(found, indent=1))
    write_table(found, study.root / "study.md")
    plot(found, study.root)
    print((study.root / "study.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
