"""Place of an answer in a response: where the model commits to it, in the thought or in the answer tag."""

import re
from typing import Optional

from megatron_ral.rewards.answer import extract_answer
from megatron_ral.rewards.reading import choice, plain


def answer_start(response: str) -> Optional[int]:
    """Return the index of the character at which a response first gives its own answer.

    The first occurrence of the answer counts, in the thought or in the answer tag. It has to stand alone: 7 occurs in
    "blue7", and neither in "17" nor in "7.5"; "red" does not occur in "hundred". The letter of a multiple choice may be
    a word of the thought, so that it counts in the tag alone, as does an answer whose text does not occur before.

    Args:
        response: Generated text.

    Returns:
        Index into `response`. None: the response has no answer (`extract_answer`), or an empty one.
    """
    answer = extract_answer(response)
    if not answer:
        return None
    inside = response.index(answer, response.index("<answer>") + len("<answer>"))
    wanted = plain(answer)
    if not wanted or choice(answer) is not None:
        return inside
    found = re.search(_alone(wanted), response)
    return found.start() if found and found.start() <= inside + answer.find(wanted) else inside


def _alone(text: str) -> str:
    """Return a pattern of the text that is not a part of a longer number or word."""
    before = after = ""
    if text[0].isdigit():
        before = r"(?<!\d)(?<!\d[.,])"
    elif text[0].isalpha():
        before = r"(?<![^\W\d_])"
    if text[-1].isdigit():
        after = r"(?!\d)(?![.,]\d)"
    elif text[-1].isalpha():
        after = r"(?![^\W\d_])"
    return before + re.escape(text) + after
