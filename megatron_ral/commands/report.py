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

COLUMNS = ("accuracy", "format_rate", "target_attention", "num_prompts")
"""Columns of the table; report.json has more."""


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
        report[stage] = {name: result[name] for name in (*COLUMNS, "target_attention_by_layer")}
    report["wall_seconds"] = {
        name: float(value) for name, _, value in (phase.partition("=") for phase in arguments.phase)
    }
    report["layout"] = _read(arguments.output_dir / "rl" / "summary.json")["layout"]
    (arguments.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{'':>6}" + "".join(f"{name:>18}" for name in COLUMNS))
    for stage in ("sft", "rl"):
        row = report[stage]
        print(
            f"{stage:>6}{row['accuracy']:>18.3f}{row['format_rate']:>18.3f}{row['target_attention']:>18.3f}"
            f"{row['num_prompts']:>18d}"
        )
    for stage in ("sft", "rl"):
        by_layer = " ".join(f"{share:.3f}" for share in report[stage]["target_attention_by_layer"])
        print(f"{stage:>6} target attention, first to last layer: {by_layer}")
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
