"""Find out whether explored attention teaches a model to look: contrast, its controls and GRPO from one wrong start.

    python tools/study_explored.py --output-dir DIR [--seeds 2 3 4 5] [--tasks tokens-9 ...] [--arms ARM ...] [--jobs 2]

The task is digit search with 3 x 3 cells and two digits in each (100 answers), in pictures of several sizes or, one
cell after the other, in time. A model learns to read a single cell, and then to search; seeds below 6 share this base
model, later ones have an own order of its second lesson. Each seed then teaches it to look at the wrong cell with
confidence: 99 % of these lessons are answered with the number of the next colour. Hardly any group of GRPO holds a
right response after that. All arms of a seed share its start and its order of prompts. The base model of larger
pictures and of clips goes on from that of smaller pictures: a single cell first, then the search, which it finds in
fewer steps and in the same layer. In the task own-weights each seed has random weights of its own.

A finished run is one line of DIR/results.jsonl (or of --results), with its settings and curves. Runs that stand there
are not repeated, so that the study can be stopped and continued, also on another machine. Settings were chosen on the
seeds 0 and 1 (--tune), which the report leaves out. Writes DIR/explored.md and DIR/explored_*.png.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ral.demo.explored import (
    ARMS,
    LESSON_SIZE,
    SEARCH_DATA,
    SEARCHING,
    VIDEO_DATA,
    arm_settings,
    read_curves,
    searching_layers,
)
from megatron_ral.demo.explored_report import Results, paired_differences, plot, table
from megatron_ral.demo.runs import beside, call, side_by_side, train_once

TUNING_SEEDS = (0, 1)
REPORTED = tuple(name for name, arm in ARMS.items() if not arm.on_request)


@dataclass(frozen=True)
class Task:
    """Samples of one kind: pictures of one size, or clips."""

    title: str
    data: tuple[object, ...]
    """Tool that writes the samples, and its options."""
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
    """Task whose base model 0 learns to read and to search these samples too. Empty: a model with random weights."""
    own_weights: bool = False
    """True if each seed has random weights of its own, of which the first layer cannot search."""
    fewer: int = 0
    """Samples of a lesson of right searches among 2 x 2 cells, before that of all cells. 0: none."""


PICTURES, CLIPS = "tools/make_digit_search.py", "tools/make_video_search.py"
COARSE = ("rollout.attention_noise.grid=3",)
FRAMES = ("rollout.attention_noise.grid=1",)
TASKS = {
    "tokens-9": Task("9 visual tokens", (PICTURES, *SEARCH_DATA), 19200, 19200, 11200),
    "tokens-36": Task(
        "36 visual tokens",
        (PICTURES, *SEARCH_DATA, "--cell-pixels", 56),
        *(9600, 9600, 9600),
        COARSE,
        more=6400,
        before="tokens-9",
    ),
    "tokens-144": Task(
        "144 visual tokens",
        (PICTURES, *SEARCH_DATA, "--cell-pixels", 112),
        *(9600, 9600, 11200),
        COARSE,
        more=6400,
        before="tokens-36",
    ),
    "own-weights": Task(
        "9 visual tokens, random weights of each seed's own",
        (PICTURES, *SEARCH_DATA),
        *(19200, 8000, 11200),
        ("rollout.attention_noise.layers=[1,2,3]",),  # layer 0 stays even
        more=22400,
        own_weights=True,
        fewer=4800,
    ),
    "video": Task(
        "video, 9 scenes of 4 visual tokens",
        (CLIPS, *VIDEO_DATA, "--cell-pixels", 56, "--fps", 1),
        *(9600, 9600, 9600),
        FRAMES,
        more=6400,
        before="tokens-36",
    ),
}


def base_of(task: str, seed: int) -> int:
    """Return the number of the base model of a seed: 0 below seed 6, one of its own for each seed from there on. With
    weights of its own every seed has its own."""
    return 0 if seed < 6 and not TASKS[task].own_weights else seed


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

    def random_model(self, task: str = "tokens-9", number: int = 0) -> Path:
        """Write the model with random weights in which a curriculum begins, and return its folder."""
        own = TASKS[task].own_weights
        model = self.root / task / f"model_{number}" if own else self.root / "tokens-9" / "model"
        options = ("--seed", number, "--even-layers", 1) if own else ()
        if not (model / "config.json").is_file():
            call(beside(model, ".log"), "tools/make_tiny_model.py", "--output", model, "--force", *options)
        return model

    def make_data(self, task: str) -> None:
        """Write the samples of a task, and those of the tasks before it."""
        if TASKS[task].before:
            self.make_data(TASKS[task].before)
        model = self.random_model()
        parts = [
            (self.data(task), ("--distinct",), {"biased": 12800, "rl": 4096, "heldout": 1024}),
            (self.lessons(task), (), {"single": 9600, "search": TASKS[task].search}),
        ]
        if TASKS[task].fewer:
            parts.append((self.few_cells(task), ("--grid", 2), {"search": TASKS[task].fewer}))
        for folder, options, splits in parts:
            if (folder / "dataset_info.json").is_file():
                continue
            sizes = {**dict.fromkeys(("single", "search", "biased", "rl", "heldout"), 4), **splits}  # 4: the least
            call(
                beside(folder, ".log"),
                *(*TASKS[task].data, "--output", folder, "--force", *options),
                *(part for split, size in sizes.items() for part in (f"--num-{split}", size)),
            )
            call(beside(folder, ".log"), "tools/index_shards.py", f"{folder}/*.tar", "--model", model)

    def few_cells(self, task: str) -> Path:
        """Return the folder of the samples with 2 x 2 cells."""
        return self.root / task / "few_cells"

    def reader(self, task: str, number: int = 0) -> Path:
        """Train the model that reads the number of a single cell, and return its folder.

        Args:
            number: number of the base model, where each begins with weights of its own.
        """
        before, own = TASKS[task].before, TASKS[task].own_weights
        target = self.root / task / (f"reader_{number}" if own else "reader")
        model = self.base(before, 0) if before else self.random_model(task, number)
        self.supervise(task, model, target, number if own else 0, self.lessons(task), "single")
        return target / "hf"

    def base(self, task: str, number: int) -> Path:
        """Train the reader to search, and return its folder."""
        target, model = self.root / task / f"base_{number}", self.reader(task, number)
        if TASKS[task].fewer:
            few = self.root / task / f"few_{number}"
            self.supervise(task, model, few, number, self.few_cells(task), "search", TASKS[task].fewer)
            model = few / "hf"
        self.supervise(task, model, target, number, self.lessons(task), "search")
        if not TASKS[task].more:
            return target / "hf"
        longer = self.root / task / f"base_{number}_longer"
        self.supervise(task, target / "hf", longer, number + 100, self.lessons(task), "search", TASKS[task].more)
        return longer / "hf"

    def start(self, task: str, seed: int) -> Path:
        """Teach a base model to look at the wrong cell, and return its folder: the start of all arms of a seed."""
        target = self.root / task / f"seed_{seed}" / "start"
        seconds = self.supervise(task, self.base(task, base_of(task, seed)), target, seed, self.data(task), "biased")
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
        start, more = self.start(task, seed), {}
        if SEARCHING in settings:
            more["layers"] = self.searching(task, seed)
        seconds = train_once(
            "ral_tiny",
            start,
            target,
            seed,
            [
                f"data.eval_shards='{self.data(task)}/heldout-*.tar'",
                f"data.train=[{{shards: '{self.data(task)}/rl-*.tar'}}]",
                f"train.num_steps={self.num_rollouts}",
                f"logging.eval_interval={self.eval_interval}",
                "logging.num_eval_prompts=512",
                "logging.gradient_ratio_interval=10",
                *(setting.replace("SEARCHING", str(more.get("layers"))) for setting in settings),
            ],
        )
        self.record(task, seed, name, target, seconds, settings=list(settings), **more)

    def searching(self, task: str, seed: int) -> list[int]:
        """Return the layers in which the base model of a seed searches."""
        start = self.results.find(task, seed, "start")
        assert start is not None, "`start` has recorded it"
        return searching_layers(lambda layer: start["curves"][f"gaze_{layer}"][0][1])


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
        if not TASKS[task].own_weights:
            study.reader(task)
    side_by_side("base models", study.base, sorted({(task, base_of(task, seed)) for task, seed in seeds_left}), jobs)
    side_by_side("starts", study.start, seeds_left, jobs)
    side_by_side("arms", study.arm, left, jobs)


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
    results = Results((arguments.results or root / "results.jsonl").absolute(), settings_of)
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
            *(name for name, arm in ARMS.items() if arm.on_request),
        ]
    if not arguments.report_only:
        run_all(study, arguments.tasks, seeds, arms, arguments.jobs)
    root.mkdir(parents=True, exist_ok=True)
    text = []
    for task in arguments.tasks:
        text += table(results, task, TASKS[task].title, seeds, arms)
        text += paired_differences(results, task, seeds, arms)
    (root / "explored.md").write_text("\n".join(text) + "\n")
    for task in arguments.tasks:
        plot(results, task, TASKS[task].title, seeds, arms, root)
    print("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
