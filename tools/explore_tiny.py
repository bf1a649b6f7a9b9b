"""Show in minutes what explored attention does: GRPO and contrast from one start that looks at the wrong place.

    python tools/explore_tiny.py --output-dir DIR [--seed 6] [--num-rollouts 15]

Each picture of digit search has 3 x 3 cells with a number of two digits. A model with random weights learns to read a
single cell and to search for the cell of a colour. This base model is the same for all seeds. Each seed then teaches it
with wrong lessons to look at the cell of the next colour. From this start GRPO and contrast, which pulls attention to
where right responses looked under noise, train side by side, one core each, on the same prompts in the same order.
Lessons, arms and settings are those of the study (tools/study_explored.py, docs/results/explored.md).

Writes report.json and explored.png to DIR/seed_N, and a table. A phase whose result is in DIR is not repeated.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ral.demo.explored import (
    LESSON_SIZE,
    SEARCH_DATA,
    arm_settings,
    read_curves,
    searching_layer,
)
from megatron_ral.demo.heat_maps import draw_heat_map, draw_picture, is_right
from megatron_ral.demo.runs import beside, call, side_by_side, train_once

if TYPE_CHECKING:  # importing it loads the engine
    from megatron_ral.evaluation.attention_page import PageSample

LESSONS = {"single": "lessons", "search": "lessons", "biased": "data"}
"""Lesson, a split of the pictures -> folder of its pictures."""
SHOWN = {"grpo": "GRPO", "contrast": "contrast"}
COLOURS = {"grpo": "tab:blue", "contrast": "tab:orange"}
CELLS = 9


@dataclass(frozen=True)
class Comparison:
    """Folder of one comparison, and its phases."""

    root: Path
    """Pictures and base model, which all seeds share."""
    seed: int
    lessons: tuple[int, ...]
    """Supervised steps of each lesson."""
    num_rollouts: int
    num_prompts: int
    """Held-out prompts of an evaluation."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> wall seconds."""
    processor_seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> processor seconds."""

    @property
    def folder(self) -> Path:
        """Folder of what the seed makes."""
        return self.root / f"seed_{self.seed}"

    @property
    def heldout(self) -> str:
        return f"{self.root}/data/heldout-*.tar"

    def evaluation(self) -> list[str]:
        return [f"data.eval_shards='{self.heldout}'", f"logging.num_eval_prompts={self.num_prompts}"]

    @contextmanager
    def phase(self, name: str, text: str) -> Iterator[None]:
        """Say what is done inside the context, and keep its seconds."""
        print(f"{name}: {text}", flush=True)
        begin, used = time.perf_counter(), os.times()
        yield
        self.seconds[name] = time.perf_counter() - begin
        now = os.times()
        self.processor_seconds[name] = sum(now[:4]) - sum(used[:4])

    def make_data(self, folder: str, *options: str) -> None:
        """Write the pictures of some of the lessons, or those of the wrong lessons and of the arms."""
        sizes = {(LESSONS[name], name): LESSON_SIZE * steps for name, steps in zip(LESSONS, self.lessons, strict=True)}
        sizes |= {("data", "rl"): LESSON_SIZE * self.num_rollouts, ("data", "heldout"): max(self.num_prompts, 4)}
        target = self.root / folder
        if not (target / "dataset_info.json").is_file():
            splits = ("single", "search", "biased", "rl", "heldout")
            call(
                beside(target, ".log"),
                *("tools/make_digit_search.py", "--output", target, "--force", *SEARCH_DATA, *options),
                *(part for split in splits for part in (f"--num-{split}", sizes.get((folder, split), 4))),
            )

    def make_model(self) -> None:
        """Write a model with random weights."""
        model = self.root / "model"
        if not (model / "config.json").is_file():
            call(beside(model, ".log"), "tools/make_tiny_model.py", "--output", model, "--force")

    def supervise(self, lesson: str, model: Path, target: Path, seed: int, processes: int, interval: int) -> None:
        """Train on one lesson.

        Args:
            interval: steps between evaluations. 0: none.
        """
        steps = dict(zip(LESSONS, self.lessons, strict=True))[lesson]
        shards = f"'{self.root}/{LESSONS[lesson]}/{lesson}-*.tar'"
        train_once(
            "sft_tiny",
            model,
            target,
            seed,
            [
                *self.evaluation(),
                f"data.train=[{{shards: {shards}, num_samples: {LESSON_SIZE * steps}}}]",
                f"train.num_steps={steps}",
                f"train.micro_batch_size={LESSON_SIZE // processes}",
                "optimizer.learning_rate=6.0e-4",
                "optimizer.decay=constant",
                f"logging.eval_interval={interval}",
            ],
            processes,
        )

    def make_base(self, processes: int) -> None:
        """Teach reading and searching."""
        reader = self.root / "reader"
        self.supervise("single", self.root / "model", reader, 0, processes, 0)
        self.supervise("search", reader / "hf", self.root / "searcher", 0, processes, 0)

    def make_start(self, processes: int) -> None:
        """Teach to look at the wrong cell; evaluate before and after."""
        start, steps = self.folder / "start", self.lessons[-1]
        self.supervise("biased", self.root / "searcher" / "hf", start, self.seed, processes, steps)

    def train(self, arm: str) -> None:
        """Train one arm from the start, in one process."""
        train_once(
            "ral_tiny",
            self.folder / "start" / "hf",
            self.folder / arm,
            self.seed,
            [
                *self.evaluation(),
                f"data.train=[{{shards: '{self.root}/data/rl-*.tar'}}]",
                f"train.num_steps={self.num_rollouts}",
                f"logging.eval_interval={max(1, self.num_rollouts // 4)}",
                "logging.gradient_ratio_interval=0",
                *arm_settings(arm),
            ],
        )


def answer_prompts(model: Path, heldout: str, layer: int, num_prompts: int) -> "list[PageSample]":
    """Answer the first held-out prompts greedily and record the attention rows of one layer."""
    from megatron_ral.commands.attention import make_samples, parse_arguments

    options = [f"--num-samples={num_prompts}", f"--layers={layer}"]
    settings = ["rollout.max_response_length=16", "data.max_prompt_length=256"]
    return make_samples(parse_arguments([str(model), heldout, *settings, *options]))[0]


def choose_example(models: "Sequence[Sequence[PageSample]]") -> "tuple[tuple[PageSample, ...], str]":
    """Return the responses of all models to one prompt, and which prompt that is.

    The first prompt that the last model alone answers rightly is taken; if there is none, the first whose responses
    all have a row that predicts the answer; and if there is none, the first.

    Args:
        models: the same prompts, answered by each model.
    """
    prompts = list(zip(*models, strict=True))
    usable = [prompt for prompt in prompts if min(sample.deciding_token for sample in prompt) >= 0]
    wanted = [*(False for _ in models[1:]), True]
    corrected = [prompt for prompt in usable if [is_right(sample) for sample in prompt] == wanted]
    if corrected:
        return corrected[0], "the first held-out picture that contrast alone answers rightly"
    return (usable or prompts)[0], "the first held-out picture"


@dataclass(frozen=True)
class Figures:
    """Figures of the table and the picture."""

    layer: int
    """Layer that looked at the asked cell most before the wrong lessons."""
    curves: dict[str, list[tuple[int, float]]]
    """Arm -> accuracy over rollouts."""
    rows: dict[str, tuple[float, float]]
    """Model -> accuracy and share of the asked cell, at the row that decides in `layer`."""

    @classmethod
    def read(cls, comparison: Comparison) -> "Figures":
        start = read_curves(comparison.folder / "start")
        layer = searching_layer(lambda number: start[f"gaze_{number}"][0][1])
        arms = {arm: read_curves(comparison.folder / arm) for arm in SHOWN}

        def row(curves: dict[str, list[tuple[int, float]]], place: int) -> tuple[float, float]:
            return curves["accuracy"][place][1], curves[f"gaze_{layer}"][place][1]

        rows = {"searcher": row(start, 0), "start": row(arms["grpo"], 0)}
        rows |= {arm: row(curves, -1) for arm, curves in arms.items()}
        return cls(layer, {arm: curves["accuracy"] for arm, curves in arms.items()}, rows)

    @property
    def lead(self) -> float:
        """Accuracy of contrast minus that of GRPO, after the last rollout."""
        return self.rows["contrast"][0] - self.rows["grpo"][0]


def table(figures: Figures, num_rollouts: int) -> list[str]:
    """Return the lines of the final table."""
    names = {
        "searcher": "taught to search",
        "start": "then taught to look at the wrong cell: the start",
        **{arm: f"start + {num_rollouts} rollouts of {SHOWN[arm]}" for arm in SHOWN},
    }
    text = [f"{'':<50}{'right answers':>15}{'attention on the asked cell':>30}"]
    text += [f"{name:<50}{figures.rows[row][0]:>15.1%}{figures.rows[row][1]:>30.1%}" for row, name in names.items()]
    text.append(f"{'by chance':<50}{0.01:>15.1%}{1 / CELLS:>30.1%}")
    return [
        *text,
        "",
        "Right answers: share of held-out pictures, whose handwriting is in no training picture. Attention: share of",
        "the attention to the picture, at the token that predicts the answer, in the layer in which the model had",
        f"learned to search (layer {figures.layer} of 0 to 3).",
        f"Contrast is {'ahead of' if figures.lead > 0 else 'NOT ahead of'} GRPO: {100 * figures.lead:+.1f} points.",
    ]


def draw(figures: Figures, prompt: "Sequence[PageSample]", which: str, num_rollouts: int, output: Path) -> None:
    """Draw accuracy over rollouts, and where the start and both arms look on one held-out picture.

    Args:
        prompt: responses of the start and of both arms to one prompt.
        which: how the prompt was chosen.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(15, 4.3))
    grid = figure.add_gridspec(1, 6, width_ratios=(1.5, 0.12, 1, 1, 1, 1), left=0.05, right=0.99, top=0.78, bottom=0.2)
    axis = figure.add_subplot(grid[0])
    steps: tuple[int, ...] = ()
    for arm, points in figures.curves.items():
        steps, values = zip(*points, strict=True)
        axis.plot(steps, [100 * value for value in values], "o-", color=COLOURS[arm], lw=2.5, label=SHOWN[arm])
    low, high = sorted(figures.curves, key=lambda arm: figures.rows[arm][0])
    ends = {arm: 100 * figures.rows[arm][0] for arm in (low, high)}
    middle, gap = sum(ends.values()) / 2, max(ends[high] - ends[low], 8)  # so that the names do not lie on one another
    for arm, height in ((low, middle - gap / 2), (high, middle + gap / 2)):
        text, place = f"{SHOWN[arm]}: {ends[arm]:.0f} %", (1.03 * num_rollouts, height)
        axis.text(*place, text, color=COLOURS[arm], va="center", fontsize=12, fontweight="bold")
    ceiling = 100 * figures.rows["searcher"][0]
    axis.axhline(ceiling, color="grey", ls="--", lw=1)
    axis.text(0, ceiling + 1.5, "before it was taught the wrong cell", color="grey", fontsize=9)
    axis.set(xlim=(-0.5, num_rollouts * 1.6), ylim=(-2, 100), xticks=steps)
    axis.set_xlabel("rollouts (32 questions, 8 answers each)", fontsize=11)
    axis.set_ylabel("right answers, % of held-out pictures", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("Who learns to answer?", fontsize=13)

    axes = [figure.add_subplot(grid[place]) for place in range(2, 6)]
    draw_picture(axes[0], prompt[0].panels[0])
    axes[0].set_title(f"{prompt[0].question}\n(asked cell framed)", fontsize=12)
    axes[0].set_xlabel(f"right answer: {prompt[0].reference}", fontsize=13)
    titles = ("before", f"after {num_rollouts} rollouts\nof GRPO", f"after {num_rollouts} rollouts\nof contrast")
    for place, title, sample, row in zip(axes[1:], titles, prompt, ("start", *SHOWN), strict=True):
        draw_heat_map(place, sample, figures.layer, 13)
        place.set_title(title, fontsize=12, color=COLOURS.get(row, "black"))
        place.text(
            0.5,
            -0.17,
            f"asked cell: {figures.rows[row][1]:.0%}\nin the mean over all pictures",
            transform=place.transAxes,
            ha="center",
            va="top",
            fontsize=10,
        )
    figure.text(
        0.69,
        0.93,
        f"Where does it look when it decides? Numbers: share of its attention to the picture (layer {figures.layer})",
        ha="center",
        fontsize=13,
    )
    figure.text(0.99, 0.01, f"Shown: {which}.", ha="right", fontsize=8, color="grey")
    figure.savefig(output, dpi=100)
    plt.close(figure)


def run(comparison: Comparison, processes: int) -> None:
    """Run the phases that are missing."""
    root, rollouts = comparison.root, comparison.num_rollouts
    with comparison.phase("data", f"pictures and a model with random weights ({root}/*.log)"):
        side_by_side("data", comparison.make_data, [("lessons",), ("data", "--distinct")], 2)
        comparison.make_model()
    with comparison.phase("base", f"reading single cells, then searching ({root}/*.log)"):
        comparison.make_base(processes)
    with comparison.phase("start", f"learning to look at the wrong cell ({comparison.folder}/*.log)"):
        comparison.make_start(processes)
    with comparison.phase("arms", f"{rollouts} rollouts of GRPO and of contrast, side by side"):
        side_by_side("arms", comparison.train, [(arm,) for arm in SHOWN], len(SHOWN))


def report(comparison: Comparison) -> None:
    """Write report.json and explored.png, and print the table."""
    from megatron_ral.commands.common import import_libraries, quiet_third_parties

    quiet_third_parties()
    import_libraries()
    folder, figures = comparison.folder, Figures.read(comparison)
    with comparison.phase("picture", "where the models look"):
        models = [
            answer_prompts(folder / model / "hf", comparison.heldout, figures.layer, min(comparison.num_prompts, 128))
            for model in ("start", *SHOWN)
        ]
        draw(figures, *choose_example(models), comparison.num_rollouts, folder / "explored.png")
    seconds, used = comparison.seconds, comparison.processor_seconds
    written = {"seed": comparison.seed, **asdict(figures), "seconds": seconds, "processor_seconds": used}
    (folder / "report.json").write_text(json.dumps(written, indent=1) + "\n")
    print("\n".join(["", *table(figures, comparison.num_rollouts), "", f"picture: {folder / 'explored.png'}"]))
    print(
        "seconds: "
        + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
        + f", together {sum(seconds.values()):.0f}; of the processors {sum(used.values()):.0f}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the phases that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--num-rollouts", type=int, default=15)
    parser.add_argument(
        "--lessons",
        type=int,
        nargs=len(LESSONS),
        default=[600, 600, 350],
        metavar="STEPS",
        help="supervised steps of each lesson: single cells, search, wrong cell (default: %(default)s)",
    )
    parser.add_argument("--num-prompts", type=int, default=512, help="held-out prompts of an evaluation (default: 512)")
    parser.add_argument("--processes", type=int, default=2, help="processes of the supervised start (default: 2)")
    arguments = parser.parse_args(argv)
    comparison = Comparison(
        arguments.output_dir.absolute(),
        arguments.seed,
        tuple(arguments.lessons),
        arguments.num_rollouts,
        arguments.num_prompts,
    )
    run(comparison, arguments.processes)
    report(comparison)
    return 0


if __name__ == "__main__":
    sys.exit(main())
