"""Read what the models of a study write: how often a response names the colour that was asked for.

    python tools/study_thoughts.py --output-dir DIR --tasks tokens-36 --arms grpo_warm contrast [--seeds 2 3 4 5]
        [--num-prompts 256]

DIR is that of tools/study_explored.py, whose final models are still there. Each answers held-out prompts greedily. A
thought in this task is a colour and its number. A model that looks at the wrong cell can name another colour, so that
the wrong gaze falls on the right cell: its answers become right and its gaze stays wrong. The table has accuracy and
the share of responses whose first colour is the asked one, in % by seed. Responses stand in DIR/TASK/seed_N/ARM.jsonl.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from megatron_ral.demo.explored import ARMS
from megatron_ral.demo.runs import PROJECT, beside, call
from megatron_ral.demo.search_task import PALETTE

COLOUR = re.compile("|".join(PALETTE))


def named_colours(lines: Iterable[str]) -> tuple[float, float]:
    """Return accuracy, and the share of greedy responses whose first colour is that of the question.

    Args:
        lines: JSON lines of `megatron_ral.evaluate`.
    """
    right, same, count = 0.0, 0, 0
    for line in lines:
        record = json.loads(line)
        asked, named = (COLOUR.search(text) for text in (record["problem"], record["greedy"]["text"]))
        right += record["greedy"]["parts"]["accuracy"]
        same += asked is not None and named is not None and asked[0] == named[0]
        count += 1
    return right / count, same / count


def main() -> int:
    """Evaluate the models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--arms", nargs="+", required=True, choices=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4, 5])
    parser.add_argument("--num-prompts", type=int, default=256)
    arguments = parser.parse_args()
    print(f"| task | arm | accuracy, seeds {', '.join(map(str, arguments.seeds))} | asked colour named |")
    print("|---|---|---|---|")
    for task in arguments.tasks:
        root = arguments.output_dir.absolute() / task
        for arm in arguments.arms:
            found = []
            for seed in arguments.seeds:
                run = root / f"seed_{seed}" / arm
                written = beside(run, ".jsonl")
                if not written.is_file():
                    call(
                        beside(run, ".evaluation.log"),
                        *("-m", "megatron_ral.evaluate", "--model", run / "hf", "--output", beside(run, ".json")),
                        *("--config", PROJECT / "pretrained_configs" / "runs" / "ral_tiny.yaml"),
                        f"data.train=[{{shards: '{root}/data/rl-*.tar'}}]",
                        f"data.eval_shards='{root}/data/heldout-*.tar'",
                        f"logging.num_eval_prompts={arguments.num_prompts}",
                    )
                found.append(named_colours(written.read_text().splitlines()))
            columns = (" / ".join(f"{100 * value:.0f}" for value in column) for column in zip(*found, strict=True))
            print(f"| {task} | {ARMS[arm].title} | {' | '.join(columns)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
