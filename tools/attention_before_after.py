"""Draw where a tiny run's model looks before and after reinforcement learning (the picture in README.md).

    python tools/attention_before_after.py OUTPUT_DIR 'DATA_DIR/heldout-*.tar' [--output FILE.png] [--layer 1]

OUTPUT_DIR is the folder of a finished `launch_scripts/ral_tiny.sh` on digit search. Its exported models `sft/hf` and
`rl/hf` answer the first held-out prompts greedily. Every heat map is one attention row of a response: the row of the
colour token in the thought, which predicts the digit (heads averaged, own token left out, as shares of the row's
attention to the picture). The examples are the first prompts that are answered wrongly before and rightly after.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from megatron_ral.commands.attention import make_samples, parse_arguments
from megatron_ral.commands.common import import_libraries, quiet_third_parties
from megatron_ral.demo.heat_maps import draw_heat_map, draw_picture, is_right, picture_shares
from megatron_ral.evaluation.attention_page import PageSample


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="folder of a finished tiny run")
    parser.add_argument("shards", help="glob of its held-out shards")
    parser.add_argument("--output", type=Path, default=Path("attention_before_after.png"), help="PNG file to write")
    parser.add_argument("--layer", type=int, default=1, help="0-based decoder layer (default: 1)")
    parser.add_argument("--num-prompts", type=int, default=512, help="prompts of the means (default: 512)")
    return parser.parse_args(argv)


def answer_prompts(model: Path, arguments: argparse.Namespace) -> list[PageSample]:
    """Answer the prompts with one model and record every attention row of the chosen layer."""
    report = parse_arguments(
        [str(model), arguments.shards, "rollout.max_response_length=16", "data.max_prompt_length=256"]
        + [f"--num-samples={arguments.num_prompts}", f"--layers={arguments.layer}"]
    )
    return make_samples(report)[0]


def draw(pairs: Sequence[tuple[PageSample, PageSample]], layer: int, row_names: Sequence[str], output: Path) -> None:
    """Write one column per prompt: picture, attention before, attention after, with the asked cell framed."""
    figure, axes = plt.subplots(3, len(pairs), figsize=(2.35 * len(pairs) + 0.7, 9), squeeze=False)
    for column, pair in zip(axes.T, pairs, strict=True):
        draw_picture(column[0], pair[0].panels[0])
        column[0].set_title(f"{pair[0].question}\nright answer: {pair[0].reference}", fontsize=11)
        for axis, sample in zip(column[1:], pair, strict=True):
            heat = draw_heat_map(axis, sample, layer, 12)
    for axis, name in zip(axes[:, 0], row_names, strict=True):
        axis.set_ylabel(name, fontsize=10.5)
    figure.suptitle(f"Where layer {layer} looks at the token that predicts the digit (asked cell framed)", fontsize=13)
    figure.tight_layout(rect=(0, 0.06, 1, 0.995))
    bar = figure.colorbar(heat, cax=figure.add_axes((0.25, 0.052, 0.5, 0.012)), orientation="horizontal")
    bar.set_label("share of this token's attention to the picture", fontsize=9, labelpad=1)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25% (chance)", "50%", "75%", "100%"], fontsize=8)
    figure.savefig(output, dpi=90)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the picture and print the mean share on the asked cell before and after."""
    arguments = read_arguments(argv)
    quiet_third_parties()
    import_libraries()
    both = [answer_prompts(arguments.output_dir / name / "hf", arguments) for name in ("sft", "rl")]
    pairs = [pair for pair in zip(*both, strict=True) if min(sample.deciding_token for sample in pair) >= 0]
    names = ["picture"]
    for name, samples in zip(("before RL", "after RL"), zip(*pairs, strict=True), strict=True):
        share = np.mean([picture_shares(sample, arguments.layer)[sample.target].sum() for sample in samples])
        right = np.mean([is_right(sample) for sample in samples])
        names.append(f"attention {name}\nasked cell, mean of {len(samples)}: {share:.0%}")
        print(f"{name}: share of the asked cell {share:.3f}, answers right {right:.3f}, {len(samples)} prompts")
    corrected = [pair for pair in pairs if [is_right(sample) for sample in pair] == [False, True]]
    draw((corrected or pairs)[:4], arguments.layer, names, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
