"""Lines of the runs of `tools/study_explored.py`, and the tables and plots made of them."""

import json
import statistics
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_ral.demo.explored import ARMS, searching_layer
from megatron_ral.demo.runs import draw_curves, mean_and_error


class Results:
    """Lines of finished runs.

    Args:
        file: JSON lines. Made where it is missing.
        settings_of: (task, arm) -> settings with which an arm of a task is run now.
    """

    def __init__(self, file: Path, settings_of: Callable[[str, str], tuple[str, ...]]):
        self.file, self._settings_of, self._lock = file, settings_of, threading.Lock()
        lines = file.read_text().splitlines() if file.exists() else []
        self.lines: list[dict] = [json.loads(line) for line in lines if line]

    def find(self, task: str, seed: int, arm: str) -> dict | None:
        """Return the line of a run, or None. A line with other settings is refused."""
        for line in self.lines:
            if (line["task"], line["seed"], line["arm"]) == (task, seed, arm):
                if arm in ARMS and line["settings"] != list(self._settings_of(task, arm)):
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


def table(results: Results, task: str, title: str, seeds: Sequence[int], arms: Sequence[str]) -> list[str]:
    """Return the Markdown table of one task: accuracy on held-out prompts in points, mean and standard error."""
    lines = {arm: {seed: results.find(task, seed, arm) for seed in seeds} for arm in arms}
    lines = {arm: {seed: line for seed, line in found.items() if line} for arm, found in lines.items()}
    lines = {arm: found for arm, found in lines.items() if found}
    if "grpo" not in lines:
        return []
    steps = [rollout for rollout, _ in next(iter(lines["grpo"].values()))["curves"]["accuracy"]]
    shown = [step for step in steps if step]
    text = [
        f"## {title}",
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


def plot(results: Results, task: str, title: str, seeds: Sequence[int], arms: Sequence[str], folder: Path) -> None:
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
            "accuracy on held-out prompts",
            "attention on the asked cell, share of all visual tokens\n(row that decides, layer that searches)",
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
    figure.suptitle(f"{title}, {max(map(len, found.values()))} seeds: mean and standard error")
    figure.tight_layout()
    figure.savefig(folder / f"explored_{task}.png", dpi=90)
    plt.close(figure)
