"""Exact-match accuracy and format of `<think>..</think><answer>..</answer>` responses (the paper's reward)."""

import re
from typing import Optional

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_THINK_FORMAT = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL)
_ANSWER_FORMAT = re.compile(r"\s*<answer>.*?</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def extract_answer(text: str) -> Optional[str]:
    """Stripped content of the only `<answer>` tag; None where there is none or more than one (unparsed)."""
    found = _ANSWER.findall(text)
    return found[0].strip() if len(found) == 1 else None


def accuracy_reward(response: str, solution: str) -> float:
    """1.0 where the response's answer equals the solution's, else 0.0.

    Args:
        response: generated text.
        solution: reference, `<answer>..</answer>` or the bare answer.
    """
    wanted = extract_answer(solution)
    return float(extract_answer(response) == (solution.strip() if wanted is None else wanted))


def format_reward(response: str, require_think: bool = True) -> float:
    """1.0 where the whole response is `<think>..</think><answer>..</answer>`, each tag once, else 0.0.

    Args:
        response: generated text.
        require_think: False: only `<answer>..</answer>`, no think block (RAL-zero).
    """
    if any(response.count(tag) > 1 for tag in _TAGS):
        return 0.0
    if not require_think and "<think>" in response:
        return 0.0
    return float((_THINK_FORMAT if require_think else _ANSWER_FORMAT).fullmatch(response) is not None)
