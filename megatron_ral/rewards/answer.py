"""Where the answer stands: `<answer>..</answer>` in responses and solutions, and the format of a whole response.

A response has an answer if it has exactly one opening and one closing answer tag, in this order; with none or with
several it is *unparsed*, which is counted apart from wrong. Departure: Video-R1 (src/r1-v/src/open_r1/grpo.py at
59d65c3) takes the first of several tags, so that a tag quoted while thinking is scored in place of the answer, and its
format lets a response with two answers pass. Here each tag may stand once.

A solution may hold several tags: each is a reference answer, and any of them is right (one question with alternatives,
or the ten answers of VizWiz, see `rules.consensus`).
"""

import re
from collections import Counter
from typing import Optional

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_THINK_FORMAT = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL)
_ANSWER_FORMAT = re.compile(r"\s*<answer>.*?</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def extract_answer(response: str) -> Optional[str]:
    """Stripped content of the response's only answer tag; None: unparsed."""
    if response.count("<answer>") != 1 or response.count("</answer>") != 1:
        return None
    found = _ANSWER.search(response)
    return found[1].strip() if found else None


def reference_answers(solution: str) -> tuple[str, ...]:
    """Stripped content of every answer tag of a solution in order; a solution without tags is itself the answer."""
    return tuple(answer.strip() for answer in _ANSWER.findall(solution)) or (solution.strip(),)


def taught_solution(solution: str) -> str:
    """What supervised training teaches: the solution, or of several answers the most frequent (the first of equals)."""
    answers = reference_answers(solution)
    return solution if len(answers) == 1 else f"<answer>{Counter(answers).most_common(1)[0][0]}</answer>"


def accuracy_reward(response: str, solution: str, problem_type: str = "") -> float:
    """1.0 where the response's answer equals a reference answer as text, else 0.0 (the paper, for every problem type).

    Args:
        response: generated text.
        solution: `<answer>..</answer>`, once or several times, or the bare answer.
        problem_type: has no influence.
    """
    return float(extract_answer(response) in reference_answers(solution))


def format_reward(response: str, require_think: bool = True) -> float:
    """1.0 where the whole response is `<think>..</think><answer>..</answer>`, each tag once, else 0.0. White space
    around and between the two blocks is free.

    Args:
        response: generated text.
        require_think: False: only `<answer>..</answer>`, no think block (RAL-zero).
    """
    if any(response.count(tag) > 1 for tag in _TAGS):
        return 0.0
    if not require_think and ("<think>" in response or "</think>" in response):
        return 0.0
    return float((_THINK_FORMAT if require_think else _ANSWER_FORMAT).fullmatch(response) is not None)
