"""Write report.json and print a table for a run of `launch_scripts/ral_tiny.sh`.

    megatron-ral report --output-dir DIR --phase sft=SECONDS ...

Reads DIR/sft/evaluation.json, DIR/rl/evaluation.json (written by `megatron-ral evaluate`) and DIR/rl/summary.json, and
writes DIR/report.json. Also `python tools/report.py`.
"""

import argparse
import json
from pathlib import Path

from megatron_ral.commands.common import Arguments, command
from megatron_ral.errors import DataError

COLUMNS = ("accuracy", "format_rate", "target_attention", "target_chance", "num_prompts")
"""Figures of a model in report.json, beside those by layer."""
BY_LAYER = {
    "target_deciding_by_layer": "at the token that predicts the answer",
    "target_attention_by_layer": "mean over all response tokens",
    "target_peak_by_layer": "largest of a response",
}
"""Figure by layer -> its description in the table."""


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"'{path}'", None, f"cannot be read ({error}); the phase that writes it has not ended"
        ) from None


@command
def main(argv: Arguments = None) -> int:
    """Write the report and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="OUTPUT_DIR of the run")
    parser.add_argument("--phase", action="append", default=[], metavar="NAME=SECONDS", help="wall seconds of a phase")
    arguments = parser.parse_args(argv)
    report = {}
    for stage in ("sft", "rl"):
        result = _read(arguments.output_dir / stage / "evaluation.json")
        report[stage] = {name: result[name] for name in (*COLUMNS, *BY_LAYER)}
    report["wall_seconds"] = {
        name: float(value) for name, _, value in (phase.partition("=") for phase in arguments.phase)
    }
    report["layout"] = _read(arguments.output_dir / "rl" / "summary.json")["layout"]
    (arguments.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{'':>6}{'accuracy':>14}{'format_rate':>14}{'num_prompts':>14}")
    for stage in ("sft", "rl"):
        row = report[stage]
        print(f"{stage:>6}{row['accuracy']:>14.3f}{row['format_rate']:>14.3f}{row['num_prompts']:>14d}")
    print(f"\n{'attention to the asked part / attention to the picture':<56}{'sft':>8}{'rl':>8}")
    print(f"{'  without aim':<56}" + "".join(f"{report[stage]['target_chance']:>8.3f}" for stage in ("sft", "rl")))
    for name, description in BY_LAYER.items():
        for layer, shares in enumerate(zip(report["sft"][name], report["rl"][name])):
            if None in shares:
                continue  # linear attention
            label, description = f"  {description:<40} layer {layer}", ""
            print(f"{label:<56}" + "".join(f"{share:>8.3f}" for share in shares))
    gain = 100 * (report["rl"]["accuracy"] - report["sft"]["accuracy"])
    print(f"\naccuracy after RL - after SFT: {gain:+.1f} points")
    total = sum(report["wall_seconds"].values())
    print(
        "seconds: "
        + ", ".join(f"{name} {value:.0f}" for name, value in report["wall_seconds"].items())
        + f", together {total:.0f}"
    )
    print(f"report: {arguments.output_dir / 'report.json'}\npictures: tensorboard --logdir {arguments.output_dir}")
    return 0
