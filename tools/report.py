"""Gather the results of the tiny pipeline into report.json and a table.

    python tools/report.py --output-dir DIR --phase sft=SECONDS ...

Reads DIR/sft/evaluation.json and DIR/rl/evaluation.json (made by megatron_ral.evaluate) and the wall seconds each phase
took; writes DIR/report.json.
"""

import argparse
import json
from pathlib import Path

COLUMNS = ("accuracy", "format_rate", "target_attention", "num_prompts")  # of the table; the report has more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--phase", action="append", default=[], metavar="NAME=SECONDS", help="wall seconds of a phase")
    arguments = parser.parse_args()
    report = {}
    for stage in ("sft", "rl"):
        result = json.loads((arguments.output_dir / stage / "evaluation.json").read_text())
        report[stage] = {name: result[name] for name in (*COLUMNS, "target_attention_by_layer")}
    report["wall_seconds"] = {
        name: float(value) for name, _, value in (phase.partition("=") for phase in arguments.phase)
    }
    report["layout"] = json.loads((arguments.output_dir / "rl" / "summary.json").read_text())["layout"]
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


if __name__ == "__main__":
    main()
