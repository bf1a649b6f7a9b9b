"""Console script `megatron-ral COMMAND ...`, also `python -m megatron_ral COMMAND ...`.

`train`, `evaluate` and `replay` run on many ranks: start them with `torchrun ... -m megatron_ral COMMAND ...`.
"""

import importlib
import sys
from typing import Optional, Sequence

COMMANDS = {
    "train": "train a model: supervised, with RL (GRPO, RAL), or from a teacher",
    "evaluate": "answer held-out prompts and print a table",
    "replay": "repeat a step whose loss or gradient was not finite",
    "rehearse": "show what every rank of a launch would hold and send, without GPUs",
    "convert": "convert checkpoints between Hugging Face and Megatron folders",
    "shards": "make shards from records (make), or their indexes (index)",
    "inspect": "describe a folder of shards and draw some samples",
    "report": "write report.json and a table of a tiny run",
    "attention": "write an HTML page that shows where a checkpoint attends",
    "settings": "write docs/settings.md, the list of all settings",
}
"""Name of each command, which is the name of its module, and one line about it."""


def usage() -> str:
    """Return the list of commands."""
    lines = [f"  {name:<10} {about}" for name, about in COMMANDS.items()]
    return "usage: megatron-ral COMMAND ...\n\ncommands (each has --help):\n" + "\n".join(lines)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command; return its exit status, 2 for an unknown one."""
    name, *rest = sys.argv[1:] if argv is None else argv or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(usage(), file=sys.stderr)
        print(f"error: COMMAND = '{name}' is not one of them" if name else "error: give a COMMAND", file=sys.stderr)
        return 2
    sys.argv[0] = f"megatron-ral {name}"  # argparse shows it
    return importlib.import_module(f"megatron_ral.commands.{name}").main(rest) or 0
