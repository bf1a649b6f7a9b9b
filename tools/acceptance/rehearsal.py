"""What the rehearsal says of one rank with a model of so many layers, as JSON: bytes and seconds by phase.

    python -m tools.acceptance.rehearsal --config FILE --models FOLDER FOLDER --output FILE [dotted.key=value ...]

`stage` runs it in a process without a GPU, because a process that has one cannot simulate one.
"""

import argparse
import json
import os
from pathlib import Path

from megatron_ral.commands.common import quiet_third_parties
from megatron_ral.config import load_config


def rehearsed(config_path: str, overrides: list[str]) -> dict[str, dict[str, float]]:
    """Return bytes at the peak of every phase, and seconds, of one rank."""
    from megatron_ral.models.shape import read_shape
    from megatron_ral.planning.launch_plan import LaunchPlan
    from megatron_ral.planning.rehearse import rehearse

    config = load_config(config_path, overrides)
    rehearsal = rehearse(LaunchPlan.from_config(config, 1), read_shape(config.model.path))
    return {
        "bytes": {name: sum(kinds.values()) for name, kinds in rehearsal.ranks[0].memory.items()},
        "seconds": dict(rehearsal.seconds),
    }


def main() -> None:
    """Write the rehearsals of all models."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    quiet_third_parties()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--models", nargs="+", required=True, help="folders of the models")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    arguments = parser.parse_intermixed_args()
    found = [rehearsed(arguments.config, [*arguments.overrides, f"model.path={model}"]) for model in arguments.models]
    partial = arguments.output.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.rename(arguments.output)
    os._exit(0)  # autograd's thread of the device that is not there would not end


if __name__ == "__main__":
    main()
