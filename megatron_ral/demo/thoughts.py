"""Colours that responses of the search tasks name in their thoughts.

A thought of these tasks is a colour and its number. A model that looks at the cell of the next colour can be right
without looking at the asked cell: it names the colour before the asked one, and its wrong gaze falls on the right cell.
"""

import re

from megatron_ral.demo.search_task import PALETTE
from megatron_ral.rewards.answer import accuracy_reward

COLOURS = list(PALETTE)
_COLOUR = re.compile("|".join(COLOURS))


def colour_in(text: str) -> str:
    """Return the first colour that a text names; empty: none."""
    found = _COLOUR.search(text)
    return found[0] if found else ""


def other_colour(completion: str, solution: str, problem_type: str, problem: str) -> float:
    """Return 1 for a right answer whose thought does not name the asked colour first, else 0.

    With the weight of the accuracy and a minus sign, such an answer earns nothing. For `reward.functions`.

    Args:
        completion: response.
        solution: answer of the sample.
        problem_type: unused.
        problem: question, which names the asked colour.
    """
    return float(accuracy_reward(completion, solution) > 0 and colour_in(completion) != colour_in(problem))
