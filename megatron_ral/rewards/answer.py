"""Answers in their tags, `<answer>..</answer>`, of responses and solutions, and the format of a whole response.

A response has an answer if it has exactly one opening and one closing answer tag, in this order. Otherwise it is
*unparsed*, which is counted apart from wrong. Departure: Video-R1 (src/r1-v/src/open_r1/grpo.py at 59d65c3) takes the
first of several tags, so that a tag quoted while thinking is scored in place of the answer, and its format lets a
response with two answers pass. Here each tag may stand once.

A solution may hold several tags. Each is a reference answer, and any of them is right (a question with alternatives, or
the ten answers of VizWiz, see `rules.consensus`). Of a worked solution only the final answer is the reference: the text
behind `####` on the last line (GSM8K), or inside the only `\\boxed{..}` (MATH). `references.py` says which solutions
are refused.
"""

import re
from collections import Counter
from typing import Optional

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_MARKED = re.compile(r"(?:.*\s)?####[ \t]*([^\n]*)", re.DOTALL)
_BOX = r"\boxed{"
_THINK_FORMAT = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL)
_THOUGHT = re.compile(r"\s*<think>.*</think>\s*", re.DOTALL)
_ANSWER_FORMAT = re.compile(r"\s*<answer>.*?</answer>\s*", re.DOTALL)
_INVISIBLE = "\u200b\u200e\u200f\u2060\ufeff"
"""Characters without width that stand around copied text and are no white space to Python."""
FORMAT_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""Tags that the format reward and the answer are read from."""


def extract_answer(response: str) -> Optional[str]:
    """Return the stripped content of the response's only answer tag, or None if the response is unparsed."""
    if response.count("<answer>") != 1 or response.count("</answer>") != 1:
        return None
    found = _ANSWER.search(response)
    return _stripped(found[1]) if found else None


def tagged_texts(solution: str) -> tuple[str, ...]:
    """Return the stripped content of each answer tag of a solution; a solution without tags is itself the content."""
    return tuple(map(_stripped, _ANSWER.findall(solution))) or (_stripped(solution),)


def reference_answers(solution: str) -> tuple[str, ...]:
    """Return the reference answer in each answer tag of a solution; a solution without tags is itself the content."""
    return tuple(map(_final_answer, tagged_texts(solution)))


def _stripped(text: str) -> str:
    return text.strip().strip(_INVISIBLE).strip()


def _final_answer(text: str) -> str:
    """Return the text behind `####` on the last line, or inside the only box; another text stays as it is."""
    marked = _MARKED.fullmatch(text)
    if marked:
        text = marked[1].strip()
    if text.count(_BOX) == 1:
        text = inside_braces(text, text.index(_BOX) + len(_BOX)).strip()
    return text


def inside_braces(text: str, start: int) -> str:
    """Return the text from `start` to the brace that closes the one before it, or the whole text if there is none."""
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return text


def taught_response(process: str, solution: str, include_process: bool = True) -> str:
    """Return the response that supervised training teaches: thought and answer in the format of `format_reward`.

    The thought is `process`, or else the text before the answer tag. One without its tags gets them, and tags of the
    format inside it are dropped. The answer is that of the solution, the final one of a worked text, or the most
    frequent of several (the first of equally frequent ones).

    Args:
        process: Reasoning of the sample; may be empty.
        solution: Solution of the sample.
        include_process: Presence of the thought; False teaches the answer alone.
    """
    thought = (process or solution[: max(0, solution.find("<answer>"))]) if include_process else ""
    if thought.strip() and not _is_thought(thought):
        for tag in FORMAT_TAGS:
            thought = thought.replace(tag, " ")
        thought = f"<think>{thought.strip()}</think>"
    answers, texts = list(reference_answers(solution)), list(tagged_texts(solution))
    if len(answers) > 1 or (answers != texts and texts[0] != f"{_BOX}{answers[0]}}}"):
        return f"{thought}<answer>{Counter(answers).most_common(1)[0][0]}</answer>"
    tagged = _ANSWER.search(solution)
    return thought + (tagged[0] if tagged else f"<answer>{texts[0]}</answer>")


def _is_thought(text: str) -> bool:
    return _THOUGHT.fullmatch(text) is not None and all(
        text.count(tag) == (tag in FORMAT_TAGS[:2]) for tag in FORMAT_TAGS
    )


def accuracy_reward(response: str, solution: str, problem_type: str = "") -> float:
    """Return 1.0 if the response's answer equals a reference answer, or the whole content of its tag, else 0.0.

    Args:
        response: generated text.
        solution: `<answer>..</answer>`, once or several times, or the bare answer.
        problem_type: unused; it makes the signature that of every reward.

    Source: RAL (arXiv 2602.04884), for every problem type.
    """
    return float(extract_answer(response) in (*reference_answers(solution), *tagged_texts(solution)))


def format_reward(response: str, require_think: bool = True) -> float:
    """Return 1.0 if the whole response is `<think>..</think><answer>..</answer>`, each tag once, else 0.0.

    White space around and between the two blocks is ignored.

    Args:
        response: generated text.
        require_think: presence of the think block; False: only `<answer>..</answer>` without it (RAL-zero).
    """
    if any(response.count(tag) > 1 for tag in FORMAT_TAGS):
        return 0.0
    if not require_think and ("<think>" in response or "</think>" in response):
        return 0.0
    return float((_THINK_FORMAT if require_think else _ANSWER_FORMAT).fullmatch(response) is not None)
