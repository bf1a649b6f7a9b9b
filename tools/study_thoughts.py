"""Read what the models of a study write: which colour a right answer names in its thought.

    python tools/study_thoughts.py --output-dir DIR --tasks tokens-36 --arms grpo_warm contrast [--seeds 2 3 4 5]
        [--num-prompts 256]

DIR is that of tools/study_explored.py, whose final models are still there. Each answers held-out prompts greedily. A
thought in this task is a colour and its number. A model that looks at the cell of the next colour can name the colour
before the asked one: its wrong gaze then falls on the right cell, and its answer is right. The table counts the right
answers of all seeds by the first colour that they name, and has the share of answers that are right and name the asked
colour, in % by seed. Responses stand in DIR/TASK/seed_N/ARM.jsonl.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from megatron_ral.demo.explored import ARMS
from megatron_ral.demo.runs import PROJECT, beside, call
from megatron_ral.demo.thoughts import COLOURS, colour_in

KINDS = ("asked", "before", "other")


def right_answers(lines: Iterable[str]) -> tuple[Counter[str], int]:
    """Return how many greedy responses are right, by the first colour that they name, and the number of responses.

    Args:
        lines: JSON lines of `megatron_ral.evaluate`.

    Returns:
        Counts of `KINDS`: the colour asked for, the one before it in the palette, another or none; and their number.
    """
    counts: Counter[str] = Counter()
    number = 0
    for line in lines:
        record = json.loads(line)
        number += 1
        if record["greedy"]["parts"]["accuracy"] < 1:
            continue
        asked, named = (colour_in(text) for text in (record["problem"], record["greedy"]["text"]))
        assert asked, "every question names a colour"
        back = (COLOURS.index(asked) - COLOURS.index(named)) % len(COLOURS) if named else -1
        counts["asked" if back == 0 else "before" if back == 1 else "other"] += 1
    return counts, number


def greedy_responses(run: Path, data: Path, num_prompts: int) -> list[str]:
    """Return JSON lines of `megatron_ral.evaluate` for the final model of a run, made unless they are there already.

    Lines of another number of prompts, and those older than the model, are made again.

    Args:
        run: folder of the run. The lines go beside it.
        data: folder of the held-out prompts.
        num_prompts: number of prompts.
    """
    written, model = beside(run, ".jsonl"), run / "hf"
    exported = model / "config.json"
    is_old = written.is_file() and exported.is_file() and written.stat().st_mtime < exported.stat().st_mtime
    lines = written.read_text().splitlines() if written.is_file() and not is_old else []
    if len(lines) == num_prompts:
        return lines
    call(
        beside(run, ".evaluation.log"),
        *("-m", "megatron_ral.evaluate", "--model", model, "--output", beside(run, ".json")),
        *("--config", PROJECT / "pretrained_configs" / "runs" / "ral_tiny.yaml"),
        f"data.train=[{{shards: '{data}/rl-*.tar'}}]",
        f"data.eval_shards='{data}/heldout-*.tar'",
        f"logging.num_eval_prompts={num_prompts}",
    )
    return written.read_text().splitlines()


def main() -> int:
    """Evaluate the models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--arms", nargs="+", required=True, choices=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4, 5])
    parser.add_argument("--num-prompts", type=int, default=256)
    arguments = parser.parse_args()
    seeds = ", ".join(map(str, arguments.seeds))
    print(f"| task | arm | right | naming {' | '.join(KINDS)} | right and asked colour named, seeds {seeds} |")
    print("|---|---|---|---|---|---|---|")
    for task in arguments.tasks:
        root = arguments.output_dir.absolute() / task
        for arm in arguments.arms:
            found, shares = Counter[str](), []
            for seed in arguments.seeds:
                responses = greedy_responses(root / f"seed_{seed}" / arm, root / "data", arguments.num_prompts)
                counts, number = right_answers(responses)
                found += counts
                shares.append(f"{100 * counts['asked'] / number:.1f}")
            columns = [found.total(), *(found[kind] for kind in KINDS), " / ".join(shares)]
            print(f"| {task} | {ARMS[arm].title} | {' | '.join(map(str, columns))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
