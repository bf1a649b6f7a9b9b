"""Compare ways to learn from a larger tiny teacher on digit search, over seeds, with reinforcement learning and
without.

    python tools/distill_study.py --output-dir DIR [--seeds 0 1 2 3 4] [--arms tokens tokens_all ...] [--jobs 2]

One teacher is trained to search the grid; each seed's student can read single cells and cannot search. Every arm of a
seed starts from the same student, sees the same prompts in the same order and draws from the same random streams. Runs
that are done are not run again, so that the study can be stopped and gone on with. Leaves DIR/distill.md (tables),
DIR/distill.json and DIR/distill_*.png.
"""

import argparse
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_ral.demo.runs import call, curve, draw_curves, mean_and_error, side_by_side, train_once

TEACHER = ("--hidden-size", 192, "--intermediate-size", 576, "--num-layers", 6, "--num-heads", 6)
TEACHER_SAMPLES = {"single": 4800, "search": 19200}
STUDENT_SAMPLES = {"single": 4800}
GOAL = 0.8


@dataclass(frozen=True)
class Arm:
    """One way to learn."""

    title: str
    settings: tuple[str, ...]
    teaches: bool = True
    rl: bool = False

    @property
    def baseline(self) -> str:
        """Name of the arm to which differences are taken."""
        return "tokens_rl" if self.rl else "tokens"

    def with_rl(self) -> "Arm":
        return Arm(
            f"{self.title}, RL" if self.teaches else "RL alone (GRPO)",
            (*self.settings, "loss.policy_coef=1.0"),
            self.teaches,
            rl=True,
        )


def _arms() -> dict[str, Arm]:
    no_tokens, no_attention = "distill.token_coef=0.0", "distill.attention_coef=0.0"
    add_teacher_outputs = {
        "tokens": Arm("tokens", (no_attention,)),
        # each at the better of two coefficients, 30 and 100, as tried on seed 0
        "tokens_last": Arm(
            "tokens + attention, last layer", ("distill.attention_layers=[-1]", "distill.attention_coef=30.0")
        ),
        "tokens_all": Arm("tokens + attention, all layers", ("distill.attention_coef=100.0",)),
        "attention": Arm("attention alone, all layers", (no_tokens, "distill.attention_coef=100.0")),
        "shuffled": Arm(
            "tokens + shuffled attention, all layers",
            ("distill.attention_rows=shuffled", "distill.attention_coef=100.0"),
        ),
    }
    arms = {
        "sft": Arm(
            "SFT on the teacher's outputs",
            ("distill.token_divergence=cross_entropy", "distill.teacher_rollouts=1.0", no_attention),
        ),
        **add_teacher_outputs,
    }
    return arms | {
        "grpo": Arm("", (), teaches=False).with_rl(),
        **{f"{name}_rl": arm.with_rl() for name, arm in add_teacher_outputs.items()},
    }


ARMS = _arms()


@dataclass(frozen=True)
class Study:
    """Folder of one study, and the paths in it."""

    root: Path
    num_rollouts: int
    eval_interval: int

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    def run(self, seed: int, name: str) -> Path:
        return self.root / f"seed_{seed}" / name

    def make_data(self) -> None:
        if not (self.data / "dataset_info.json").is_file():
            call(
                self.root / "data.log",
                "tools/make_digit_search.py",
                "--output",
                self.data,
                "--force",
                "--num-search",
                max(6400, TEACHER_SAMPLES["search"] // 2),
                "--num-heldout",
                1024,
            )

    def cold_start(self, model: Path, target: Path, seed: int, samples: dict[str, int], *sizes: object) -> None:
        """Make a new model and train it under supervision."""
        if not (model / "config.json").is_file():
            call(
                model.with_name(model.name + ".log"),
                "tools/make_tiny_model.py",
                "--output",
                model,
                "--seed",
                seed,
                *sizes,
            )
        sources = ", ".join(
            f"{{shards: '{self.data}/{name}-*.tar', num_samples: {count}}}" for name, count in samples.items()
        )
        train_once(
            "sft_tiny",
            model,
            target,
            seed,
            [
                f"data.train=[{sources}]",
                f"data.eval_shards='{self.data}/heldout-*.tar'",
                f"train.num_steps={sum(samples.values()) // 32}",
                f"logging.eval_interval={sum(samples.values()) // 32}",
                "logging.num_eval_prompts=1024",
            ],
        )

    def make_teacher(self) -> None:
        self.cold_start(self.root / "teacher_model", self.teacher, 1000, TEACHER_SAMPLES, *TEACHER)

    def make_student(self, seed: int) -> None:
        self.cold_start(self.run(seed, "model"), self.run(seed, "student"), seed, STUDENT_SAMPLES)

    def arm(self, seed: int, name: str) -> None:
        arm = ARMS[name]
        teacher = (f"teacher.path='{self.teacher}/hf'",) if arm.teaches else ()
        train_once(
            "distill_tiny",
            self.run(seed, "student") / "hf",
            self.run(seed, name),
            seed,
            [
                f"data.train=[{{shards: '{self.data}/rl-*.tar'}}]",
                f"data.eval_shards='{self.data}/heldout-*.tar'",
                f"train.num_steps={self.num_rollouts}",
                f"logging.eval_interval={self.eval_interval}",
                "logging.num_eval_prompts=512",
                "logging.gradient_ratio_interval=5",
                *teacher,
                *arm.settings,
            ],
        )


def run_all(study: Study, seeds: list[int], arms: list[str], jobs: int) -> None:
    study.make_data()
    side_by_side(
        "teacher and students",
        lambda work, *task: work(*task),
        [(study.make_teacher,), *((study.make_student, seed) for seed in seeds)],
        jobs,
    )
    side_by_side("arms", study.arm, [(seed, name) for seed in seeds for name in arms], jobs)


def steps_to(goal: float, points: list[tuple[int, float]]) -> float:
    """Return the rollouts until the curve first reaches `goal`, interpolated linearly; infinite if it never does."""
    for (before, low), (after, high) in itertools.pairwise(points):
        if low >= goal:
            return before
        if high >= goal:
            return before + (after - before) * (goal - low) / (high - low)
    return float("inf")


def results(study: Study, seeds: list[int], arms: list[str]) -> dict:
    """Return the curves of all runs and the numbers of the tables."""
    curves = {
        name: {
            tag: [curve(study.run(seed, name), f"eval/{tag}") for seed in seeds]
            for tag in ("accuracy", "target_attention")
        }
        for name in arms
    }
    rows = {}
    for name in arms:
        accuracy, mass = curves[name]["accuracy"], curves[name]["target_attention"]
        row = {
            "title": ARMS[name].title,
            "with_rl": ARMS[name].rl,
            "steps": [step for step, _ in accuracy[0]],
            "accuracy": [[value for _, value in points] for points in accuracy],
            "target_mass": [[value for _, value in points] for points in mass],
            "steps_to_goal": [steps_to(GOAL, points) for points in accuracy],
        }
        baseline = curves.get(ARMS[name].baseline, {}).get("accuracy")
        if baseline:
            row["difference"] = [
                [value - other for (_, value), (_, other) in zip(mine, theirs)]
                for mine, theirs in zip(accuracy, baseline)
            ]
        rows[name] = row
    teacher = curve(study.teacher, "eval/accuracy")
    return {
        "seeds": seeds,
        "goal": GOAL,
        "teacher": teacher[-1][1] if teacher else None,
        "rows": rows,
        "curves": curves,
    }


def write_table(found: dict, path: Path) -> None:
    """Write Markdown: held-out accuracy over rollouts in percent, paired differences, target mass, steps to goal."""
    rows = found["rows"]
    steps = next(iter(rows.values()))["steps"]
    shown = [
        index for index, step in enumerate(steps) if step and (len(steps) <= 7 or index % 2 == (len(steps) - 1) % 2)
    ]

    def cell(runs: list[list[float]], index: int, sign: str = "") -> str:
        mean, error = mean_and_error([100 * run[index] for run in runs])
        return f"{mean:{sign}.1f} +- {error:.1f}"

    lines = [
        f"Teacher: {100 * found['teacher']:.1f} % of the held-out prompts. {len(found['seeds'])} seeds; mean +- "
        "standard error over seeds.",
        "",
    ]
    for with_rl, title in ((False, "Without RL"), (True, "With RL")):
        chosen = {name: row for name, row in rows.items() if row["with_rl"] == with_rl}
        if not chosen:
            continue
        lines += [
            f"### {title}",
            "",
            f"| arm | {' | '.join(f'after {steps[index]}' for index in shown)} | "
            f"rollouts to {100 * found['goal']:.0f} % | target mass |",
            "|---" * (len(shown) + 3) + "|",
        ]
        first = next(iter(chosen.values()))
        lines.append(f"| start | {cell(first['accuracy'], 0)} |{' |' * len(shown)} {cell(first['target_mass'], 0)} |")
        for row in chosen.values():
            reached = [value for value in row["steps_to_goal"] if value != float("inf")]
            goal = "{:.1f} +- {:.1f}".format(*mean_and_error(reached)) if reached else "never"
            if reached and len(reached) < len(found["seeds"]):  # a mean of those alone would flatter
                goal = f"reached by {len(reached)} of {len(found['seeds'])} seeds"
            lines.append(
                f"| {row['title']} | {' | '.join(cell(row['accuracy'], index) for index in shown)} | {goal} | "
                f"{cell(row['target_mass'], -1)} |"
            )
        lines += [
            "",
            "Paired difference from token distillation, points:",
            "",
            f"| arm | {' | '.join(f'after {steps[index]}' for index in shown)} |",
            "|---" * (len(shown) + 1) + "|",
        ]
        lines += [
            f"| {row['title']} | {' | '.join(cell(row['difference'], index, '+') for index in shown)} |"
            for name, row in chosen.items()
            if "difference" in row and name != ARMS[name].baseline
        ]
        lines.append("")
    path.write_text("\n".join(lines))


def plot(found: dict, folder: Path) -> None:
    """Draw accuracy and target mass over rollouts, mean over seeds with its standard error; the control dotted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for tag, label in (
        ("accuracy", "held-out accuracy"),
        ("target_attention", "target mass / visual mass, last layer"),
    ):
        figure, axes = plt.subplots(1, 2, figsize=(14, 5), sharey=True)
        for axis, (with_rl, title) in zip(axes, ((False, "without RL"), (True, "with RL"))):
            for number, (name, row) in enumerate(
                (name, row) for name, row in found["rows"].items() if row["with_rl"] == with_rl
            ):
                draw_curves(
                    axis,
                    found["curves"][name][tag],
                    color=plt.get_cmap("tab10")(number),
                    label=row["title"],
                    linestyle=":" if name.startswith("shuffled") else "-",
                )
            if tag == "accuracy":
                axis.axhline(found["goal"], color="grey", linewidth=0.5)
            axis.set(title=title, xlabel="rollouts", ylabel=label)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / f"distill_{tag}.png", dpi=90)
        plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=f"of: {', '.join(ARMS)}"
    )
    parser.add_argument("--num-rollouts", type=int, default=30)
    parser.add_argument("--eval-interval", type=int, default=5, help="rollouts between evaluations")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, each on one core")
    arguments = parser.parse_args()
    study = Study(arguments.output_dir.absolute(), arguments.num_rollouts, arguments.eval_interval)
    run_all(study, arguments.seeds, arguments.arms, arguments.jobs)
    found = results(study, arguments.seeds, arguments.arms)
    (study.root / "distill.json").write_text(json.dumps(found, indent=1))
    write_table(found, study.root / "distill.md")
    plot(found, study.root)
    print((study.root / "distill.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
