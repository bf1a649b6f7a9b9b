"""Compare the runs of `launch_scripts/explore_tiny.sh`: print a table and draw two pictures.

    python tools/explore_tiny.py OUTPUT_DIR 'DATA_DIR/heldout-*.tar' --runs grpo contrast

Accuracy over rollouts comes from the event files of OUTPUT_DIR/RUN. `accuracy.png` shows it, and where the runs look.
`attention.png` shows the attention of the token that predicts the digit, before reinforcement learning and after each
run, on the first prompts that the start answers wrongly and the last run rightly.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from megatron_ral.demo.runs import curve
from tools.attention_before_after import by_prompt, draw, given_answer, picture_shares

TITLES = {
    "grpo": "GRPO",
    "grpo_warm": "GRPO, temperature 1.5",
    "noise": "GRPO under attention noise",
    "contrast": "contrast of explored attention",
    "oracle": "pulled to the annotated cell",
}


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="folder of a finished run of explore_tiny.sh")
    parser.add_argument("shards", help="glob of its held-out shards")
    parser.add_argument("--runs", nargs="+", required=True, choices=list(TITLES), help="runs in the order of the table")
    parser.add_argument("--layer", type=int, default=0, help="0-based decoder layer of the maps (default: 0)")
    parser.add_argument("--num-prompts", type=int, default=256, help="prompts of the maps (default: 256)")
    return parser.parse_args(argv)


def table(folder: Path, runs: Sequence[str], layer: int) -> str:
    """Return the table: held-out accuracy and share of the asked cell over rollouts."""
    curves = {name: {tag: curve(folder / name, tag) for tag in tags(layer)} for name in runs}
    steps = [step for step, _ in curves[runs[0]]["eval/accuracy"]]
    head = f"{'after rollouts':<44}" + "".join(f"{step:>8}" for step in steps)
    lines = []
    for title, tag in zip(
        ("accuracy on held-out pictures", f"attention on the asked cell (layer {layer})"), tags(layer)
    ):
        lines += ["", title, head]
        for name in runs:
            values = dict(curves[name][tag])
            lines.append(f"  {TITLES[name]:<42}" + "".join(f"{values[step]:>8.3f}" for step in steps))
    return "\n".join(lines)


def tags(layer: int) -> tuple[str, str]:
    """Return the scalars of the table."""
    return "eval/accuracy", f"eval/target_deciding/layer_{layer}"


def plot(folder: Path, runs: Sequence[str], layer: int, output: Path) -> None:
    """Draw both scalars over rollouts."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    labels = ("accuracy on held-out pictures", f"attention on the asked cell (layer {layer})")
    for axis, tag, label in zip(axes, tags(layer), labels):
        for name in runs:
            axis.plot(*zip(*curve(folder / name, tag)), marker="o", label=TITLES[name])
        axis.set(xlabel="rollouts", ylabel=label, ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(output, dpi=90)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write the pictures."""
    arguments = read_arguments(argv)
    folder, runs, layer = arguments.output_dir, arguments.runs, arguments.layer
    text = table(folder, runs, layer)
    plot(folder, runs, layer, folder / "accuracy.png")
    models = [folder / name / "hf" for name in ("start", *runs)]
    groups = by_prompt(models, arguments)
    names = ["picture"]
    for title, samples in zip(("before", *(TITLES[name] for name in runs)), zip(*groups, strict=True), strict=True):
        share = np.mean([picture_shares(sample, layer)[sample.target].sum() for sample in samples])
        names.append(f"{title}\nasked cell, mean of {len(samples)}: {share:.0%}")
    right = [[given_answer(sample) == sample.reference for sample in group] for group in groups]
    taught = [group for group, marks in zip(groups, right, strict=True) if marks[-1] and not marks[0]]
    draw((taught or groups)[:4], layer, names, folder / "attention.png")
    print(f"{text}\n\npictures: {folder / 'accuracy.png'}, {folder / 'attention.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
