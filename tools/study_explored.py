"""Find out whether explored attention teaches a model to look: contrast, its controls and GRPO from one wrong start.

    python tools/study_explored.py --output-dir DIR [--seeds 2 3 4 5] [--tasks tokens-9 ...] [--arms ARM ...] [--jobs 2]

The task is digit search with 3 x 3 cells and two digits in each (100 answers). A model learns to read a single cell,
and then to search; seeds below 6 share this base model, later ones have an own order of its second lesson. Each seed
then teaches it to look at the wrong cell with confidence: 99 % of these lessons are answered with the number of the
next colour. Hardly any group of GRPO holds a right response after that. All arms of a seed share its start and its
order of prompts. The base model of larger pictures goes on from that of smaller ones: a single cell first, then the
search, which it finds in fewer steps and in the same layer.

A finished run is one line of DIR/results.jsonl (or of --results), with its settings and curves. Runs that stand there
are not repeated, so that the study can be stopped and continued, also on another machine. Settings were chosen on the
seeds 0 and 1 (--tune), which the report leaves out. Writes DIR/explored.md and DIR/explored_*.png.
"""

import argparse
import json
import statistics
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ral.demo.explored import (
    ARMS,
    LESSON_SIZE,
    SEARCH_DATA,
    arm_settings,
    read_curves,
    searching_layer,
)
from megatron_ral.demo.runs import beside, call, draw_curves, mean_and_error, side_by_side, train_once

TUNING_SEEDS = (0, 1)
REPORTED = tuple(name for name, arm in ARMS.items() if not arm.tuning)


@dataclass(frozen=True)
class Task:
    """One size of the pictures."""

    title: str
    cell_pixels: int
    single: int
    """Samples of single cells."""
    search: int
    """Samples of right searches."""
    biased: int
    """Samples of wrong searches."""
    settings: tuple[str, ...] = ()
    """Settings of all arms with noise."""
    more: int = 0
    """Samples of a second lesson of right searches, in another order. 0: none."""
    before: str = ""
    """Task whose base model 0 learns to read and to search these pictures too. Empty: a model with random weights."""


COARSE = ("rollout.attention_noise.grid=3",)
TASKS = {
    "tokens-9": Task("9 visual tokens", 28, 19200, 19200, 11200),
    "tokens-36": Task("36 visual tokens", 56, 9600, 9600, 9600, COARSE, more=6400, before="tokens-9"),
    "tokens-144": Task("144 visual tokens", 112, 9600, 9600, 11200, COARSE, more=6400, before="tokens-36"),
}


class Results:
    """Lines of finished runs.

    Args:
        file: JSON lines. Made where it is missing.
    """

    def __init__(self, file: Path):
        self.file, self._lock = file, threading.Lock()
        lines = file.read_text().splitlines() if file.exists() else []
        self.lines: list[dict] = [json.loads(line) for line in lines if line]

    def find(self, task: str, seed: int, arm: str) -> dict | None:
        """Return the line of a run, or None. A line with other settings is refused."""
        for line in self.lines:
            if (line["task"], line["seed"], line["arm"]) == (task, seed, arm):
                if arm in ARMS and line["settings"] != list(settings_of(task, arm)):
                    raise SystemExit(f"{self.file}: {arm} of seed {seed} on {task} was run with other settings")
                return line
        return None

    def add(self, line: dict) -> None:
        """Append the line of a run."""
        with self._lock:
            self.lines.append(line)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a") as stream:
                stream.write(json.dumps(line) + "\n")


def base_of(seed: int) -> int:
    """Return the number of the base model of a seed: 0 below seed 6, one of its own for each seed from there on."""
    return 0 if seed < 6 else seed


def settings_of(task: str, arm: str) -> tuple[str, ...]:
    """Return the settings of an arm."""
    return arm_settings(arm, TASKS[task].settings)


@dataclass(frozen=True)
class Study:
    """Folder of the study, and its runs."""

    root: Path
    results: Results
    num_rollouts: int
    eval_interval: int

    def data(self, task: str) -> Path:
        return self.root / task / "data"

    def lessons(self, task: str) -> Path:
        """Return the folder of the samples of the base models. Numbers may repeat in a picture."""
        return self.root / task / "lessons"

    def random_model(self) -> Path:
        """Write the model with random weights in which every curriculum begins, and return its folder."""
        model = self.root / "tokens-9" / "model"
        if not (model / "config.json").is_file():
            call(beside(model, ".log"), "tools/make_tiny_model.py", "--output", model, "--force")
        return model

    def make_data(self, task: str) -> None:
        """Write the pictures of a task, and those of the tasks before it."""
        if TASKS[task].before:
            self.make_data(TASKS[task].before)
        model = self.random_model()
        for folder, options, splits in (
            (self.data(task), ("--distinct",), {"biased": 12800, "rl": 4096, "heldout": 1024}),
            (self.lessons(task), (), {"single": 9600, "search": TASKS[task].search}),
        ):
            if (folder / "dataset_info.json").is_file():
                continue
            sizes = {**dict.fromkeys(("single", "search", "biased", "rl", "heldout"), 4), **splits}  # 4: the least
            call(
                beside(folder, ".log"),
                *("tools/make_digit_search.py", "--output", folder, "--force", *SEARCH_DATA, *options),
                *("--cell-pixels", TASKS[task].cell_pixels),
                *(part for split, size in sizes.items() for part in (f"--num-{split}", size)),
            )
            call(beside(folder, ".log"), "tools/index_shards.py", f"{folder}/*.tar", "--model", model)

    def reader(self, task: str) -> Path:
        """Train the model that reads the number of a single cell, and return its folder."""
        target, before = self.root / task / "reader", TASKS[task].before
        model = self.base(before, 0) if before else self.random_model()
        self.supervise(task, model, target, 0, self.lessons(task), "single")
        return target / "hf"

    def base(self, task: str, number: int) -> Path:
        """Train the reader to search, and return its folder."""
        target = self.root / task / f"base_{number}"
        self.supervise(task, self.reader(task), target, number, self.lessons(task), "search")
        if not TASKS[task].more:
            return target / "hf"
        longer = self.root / task / f"base_{number}_longer"
        self.supervise(task, target / "hf", longer, number + 100, self.lessons(task), "search", TASKS[task].more)
        return longer / "hf"

    def start(self, task: str, seed: int) -> Path:
        """Teach a base model to look at the wrong cell, and return its folder: the start of all arms of a seed."""
        target = self.root / task / f"seed_{seed}" / "start"
        seconds = self.supervise(task, self.base(task, base_of(seed)), target, seed, self.data(task), "biased")
        if self.results.find(task, seed, "start") is None:
            self.record(task, seed, "start", target, seconds)
        return target / "hf"

    def record(self, task: str, seed: int, arm: str, target: Path, seconds: float, **more: object) -> None:
        """Add the line of a finished run."""
        line = {"task": task, "seed": seed, "arm": arm, **more, "seconds": seconds, "curves": read_curves(target)}
        self.results.add(line)

    def supervise(
        self, task: str, model: Path, target: Path, seed: int, data: Path, split: str, count: int = 0
    ) -> float:
        """Train on a split of a data set, and return the processor seconds.

        Args:
            count: samples. 0: the number that the task has for the split.
        """
        count = count or getattr(TASKS[task], split)
        return train_once(
            "sft_tiny",
            model,
            target,
            seed,
            [
                f"data.eval_shards='{self.data(task)}/heldout-*.tar'",
                f"data.train=[{{shards: '{data}/{split}-*.tar', num_samples: {count}}}]",
                f"train.num_steps={count // LESSON_SIZE}",
                f"train.micro_batch_size={LESSON_SIZE}",
                "optimizer.learning_rate=6.0e-4",
                "optimizer.decay=constant",
                "logging.eval_interval=100",
                "logging.num_eval_prompts=256",
            ],
        )

    def arm(self, task: str, seed: int, name: str) -> None:
        """Train one arm."""
        target, settings = self.root / task / f"seed_{seed}" / name, settings_of(task, name)
        seconds = train_once(
            "ral_tiny",
            self.start(task, seed),
            target,
            seed,
            [
                f"data.eval_shards='{self.data(task)}/heldout-*.tar'",
                f"data.train=[{{shards: '{self.data(task)}/rl-*.tar'}}]",
                f"train.num_steps={self.num_rollouts}",
                f"logging.eval_interval={self.eval_interval}",
                "logging.num_eval_prompts=512",
                "logging.gradient_ratio_interval=10",
                *settings,
            ],
        )
        self.record(task, seed, name, target, seconds, settings=list(settings))


def missing(study: Study, tasks: Sequence[str], seeds: Sequence[int], arms: Sequence[str]) -> Iterator[tuple]:
    """Yield the runs that have no line yet, seed by seed, so that an unfinished study has whole pairs."""
    for task in tasks:
        for seed in seeds:
            for arm in arms:
                if study.results.find(task, seed, arm) is None:
                    yield task, seed, arm


def run_all(study: Study, tasks: Sequence[str], seeds: Sequence[int], arms: Sequence[str], jobs: int) -> None:
    """Make data, starts and runs that are missing."""
    left = list(missing(study, tasks, seeds, arms))
    for task in sorted({task for task, _, _ in left}):
        study.make_data(task)
    seeds_left = sorted({(task, seed) for task, seed, _ in left})
    for task in sorted({task for task, _ in seeds_left}):
        study.reader(task)
    side_by_side("base models", study.base, sorted({(task, base_of(seed)) for task, seed in seeds_left}), jobs)
    side_by_side("starts", study.start, seeds_left, jobs)
    side_by_side("arms", study.arm, left, jobs)


def points(values: Sequence[float]) -> str:
    """Return mean and standard error in points of 100."""
    mean, error = mean_and_error(values)
    return f"{100 * mean:.1f} +- {100 * error:.1f}"


def value_at(line: dict, rollout: int, name: str = "accuracy") -> float:
    """Return the value of a curve after some rollouts."""
    return dict(map(tuple, line["curves"][name]))[rollout]


def last_accuracy(line: dict) -> float:
    """Return the accuracy of the last evaluation."""
    return line["curves"]["accuracy"][-1][1]


def gaze_of(results: Results, line: dict) -> str:
    """Return the name of the curve of the layer in which the base model of a run looks at the asked cell."""
    start = results.find(line["task"], line["seed"], "start") or line
    return f"gaze_{searching_layer(lambda layer: start['curves'][f'gaze_{layer}'][0][1])}"


def rollouts_to(line: dict, level: float) -> float:
    """Return after how many rollouts the accuracy reaches a level, between two evaluations by interpolation; infinity
    where it never does."""
    before: tuple[float, float] | None = None
    for rollout, value in line["curves"]["accuracy"]:
        if value >= level:
            if before is None or value == before[1]:
                return rollout
            return before[0] + (rollout - before[0]) * (level - before[1]) / (value - before[1])
        before = rollout, value
    return float("inf")


def table(results: Results, task: str, seeds: Sequence[int], arms: Sequence[str]) -> list[str]:
    """Return the Markdown table of one task: accuracy on held-out prompts in points, mean and standard error."""
    lines = {arm: {seed: results.find(task, seed, arm) for seed in seeds} for arm in arms}
    lines = {arm: {seed: line for seed, line in found.items() if line} for arm, found in lines.items()}
    lines = {arm: found for arm, found in lines.items() if found}
    if "grpo" not in lines:
        return []
    steps = [rollout for rollout, _ in next(iter(lines["grpo"].values()))["curves"]["accuracy"]]
    shown = [step for step in steps if step]
    text = [
        f"## {TASKS[task].title}",
        "",
        f"| arm | seeds | accuracy after {' / '.join(map(str, shown))} rollouts | minus GRPO | standard errors | "
        "rollouts to GRPO's last | asked cell at deciding rows | gradient ratio | processor seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, found in lines.items():
        both = [seed for seed in found if seed in lines["grpo"]]
        curve_text = " / ".join(
            f"{100 * statistics.fmean(value_at(line, s) for line in found.values()):.1f}" for s in shown
        )
        difference, errors, reach = "", "", ""
        if both and arm != "grpo":
            gaps = [value_at(found[s], shown[-1]) - value_at(lines["grpo"][s], shown[-1]) for s in both]
            difference = points(gaps)
            mean, error = mean_and_error(gaps)
            errors = f"{mean / error:+.1f}" if error > 0 else ""
            needed = [rollouts_to(found[s], value_at(lines["grpo"][s], shown[-1])) for s in both]
            reach = f"{statistics.median(needed):.0f}"
        ratios = [value for line in found.values() for _, value in line["curves"]["ratio"]]
        gaze = points([value_at(line, shown[-1], gaze_of(results, line)) for line in found.values()])
        seconds = statistics.median(line["seconds"] for line in found.values())
        text.append(
            f"| {ARMS[arm].title} | {len(found)} | {curve_text} | {difference} | {errors} | {reach} | {gaze} | "
            f"{statistics.median(ratios) if ratios else 0:.2g} | {seconds:.0f} |"
        )
    starts = [line for seed in seeds if (line := results.find(task, seed, "start"))]
    first = [line["curves"]["accuracy"][0][1] for line in lines["grpo"].values()]
    best = [max(value for _, value in line["curves"]["accuracy"]) for line in starts]
    mixed = [1 - value for line in lines["grpo"].values() for step, value in line["curves"]["equal"] if step <= 5]
    return [
        *text,
        "",
        f"Start: accuracy {points(first)}, before the wrong lessons at most {points(best) if best else '?'}; "
        f"{100 * statistics.fmean(mixed):.0f} % of GRPO's groups are mixed in its first five rollouts.",
        "",
    ]


def paired_differences(results: Results, task: str, seeds: Sequence[int], arms: Sequence[str]) -> list[str]:
    """Return the Markdown table of contrast minus each other arm at the end, paired by seed, and that of the oracle
    minus GRPO at its best temperature, which says whether the start has power."""
    text = ["| difference | points | standard errors | by seed |", "|---|---|---|---|"]
    for first, second in (*(("contrast", arm) for arm in arms if arm != "contrast"), ("oracle", "grpo_warm")):
        found = [(results.find(task, seed, first), results.find(task, seed, second)) for seed in seeds]
        gaps = [last_accuracy(one) - last_accuracy(other) for one, other in found if one and other]
        if not gaps:
            continue
        mean, error = mean_and_error(gaps)
        errors = f"{mean / error:+.1f}" if error > 0 else ""
        by_seed = ", ".join(f"{100 * gap:+.0f}" for gap in gaps)
        text.append(f"| {ARMS[first].title} - {ARMS[second].title} | {points(gaps)} | {errors} | {by_seed} |")
    return [*text, ""] if len(text) > 2 else []


def plot(results: Results, task: str, seeds: Sequence[int], arms: Sequence[str], folder: Path) -> None:
    """Draw accuracy and gaze over rollouts, mean over seeds with its standard error; shuffled controls dotted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {arm: [line for seed in seeds if (line := results.find(task, seed, arm))] for arm in arms}
    found = {arm: lines for arm, lines in found.items() if lines}
    if not found:
        return
    figure, axes = plt.subplots(1, 2, figsize=(14, 5.2))
    for axis, name, label in zip(
        axes,
        ("accuracy", "gaze"),
        (
            "accuracy on held-out pictures",
            "attention on the asked cell\n(row that decides, layer that searches; share of the picture)",
        ),
    ):
        for index, (arm, lines) in enumerate(found.items()):
            style = ":" if "shuffled" in arm else "--" if arm in ("oracle", "evidence") else "-"
            names = [gaze_of(results, line) if name == "gaze" else name for line in lines]
            curves = [[tuple(point) for point in line["curves"][own]] for own, line in zip(names, lines)]
            draw_curves(axis, curves, color=plt.get_cmap("tab20")(index), linestyle=style, label=ARMS[arm].title)
        axis.set(xlabel="rollouts (32 prompts, 8 responses each)", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(f"{TASKS[task].title}, {max(map(len, found.values()))} seeds: mean and standard error")
    figure.tight_layout()
    figure.savefig(folder / f"explored_{task}.png", dpi=90)
    plt.close(figure)


def main() -> int:
    """Run what is missing and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--results", type=Path, help="JSON lines of finished runs (default: OUTPUT_DIR/results.jsonl)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4, 5])
    parser.add_argument("--tasks", nargs="+", default=["tokens-9"], choices=list(TASKS))
    parser.add_argument(
        "--arms", nargs="+", default=list(REPORTED), choices=list(ARMS), metavar="ARM", help=f"of: {', '.join(ARMS)}"
    )
    parser.add_argument("--tune", action="store_true", help="run all candidates on the tuning seeds instead")
    parser.add_argument("--report-only", action="store_true", help="run nothing; write the report of what is there")
    parser.add_argument("--num-rollouts", type=int, default=30)
    parser.add_argument("--eval-interval", type=int, default=15, help="rollouts between evaluations")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, each on one core")
    arguments = parser.parse_args()
    root = arguments.output_dir.absolute()
    results = Results((arguments.results or root / "results.jsonl").absolute())
    study = Study(root, results, arguments.num_rollouts, arguments.eval_interval)
    seeds, arms = arguments.seeds, arguments.arms
    if arguments.tune:
        seeds = list(TUNING_SEEDS)
        arms = [
            "grpo",
            "grpo_warm",
            "contrast",
            "noise",
            "explored",
            *(name for name, arm in ARMS.items() if arm.tuning),
        ]
    if not arguments.report_only:
        run_all(study, arguments.tasks, seeds, arms, arguments.jobs)
    root.mkdir(parents=True, exist_ok=True)
    text = [
        line
        for task in arguments.tasks
        for part in (table, paired_differences)
        for line in part(results, task, seeds, arms)
    ]
    (root / "explored.md").write_text("\n".join(text) + "\n")
    for task in arguments.tasks:
        plot(results, task, seeds, arms, root)
    print("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
