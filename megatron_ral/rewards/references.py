r"""Solutions that no response can match, found before they are used.

Responses and solutions are read alike (`answer.py`, `reading.py`). A solution with a tag that is not closed, or with a
whole calculation where the answer should be, would therefore make every response wrong, without a word in the log.
"""

import re
from typing import Optional, Sequence

from megatron_ral.rewards.answer import reference_answers, tagged_texts
from megatron_ral.rewards.mathematics import expression
from megatron_ral.rewards.options import reference_options
from megatron_ral.rewards.problem_types import MATH, MULTIPLE_CHOICE, NUMBERS, TEXTS, rule_name
from megatron_ral.rewards.reading import number

MAX_NUMBER_WORDS = 6
"""Words of the longest text that stands for a number ("5 million", "between 5 and 6")."""
SHOWN = 60
_TAG = re.compile(r"(?:<|&lt;|＜)[\s/]*answer[^<>&＜＞]{0,40}(?:>|&gt;|＞)", re.IGNORECASE)
_THINK_TAG = re.compile(r"<\s*/?\s*think\s*>", re.IGNORECASE)
_OTHER_TAG = re.compile(
    r"</?(?:final_?answer|ans|solution|response|output|result|conclusion|reasoning|thinking|thought|summary|caption)>",
    re.IGNORECASE,
)
"""Tags of other formats, such as that of LLaVA-CoT."""
_LIST_AS_TEXT = re.compile(r"\[\s*(['\"]).*\1\s*,?\s*\]", re.DOTALL)
_BOX_OR_MARK = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])|(?:^|\s)####")
_SEVERAL_SENTENCES = re.compile(r"\n\s*\S|\w{2}[.!?]\s+\S|\d[.!?]\s+[A-Z]")
_CALCULATION = re.compile(r"\d\s*=|=\s*[-+$]?\d|\bstep\s*\d", re.IGNORECASE)
_CONCLUSION = re.compile(r"\b(?:answer|result|option|choice)\s+(?:is|are)\b\s*:?|\banswer\s*[:=]", re.IGNORECASE)
_CONCLUSION_START = re.compile(r"(?:\W|\b(?:so|thus|therefore|hence|the|final|correct)\b)*", re.IGNORECASE)
MAX_CONCLUSION_WORDS = 4


def reference_problem(solution: str, problem_type: str = "") -> Optional[str]:
    """Return the reason for which no response can match a solution, with the way out, or None.

    Args:
        solution: `<answer>..</answer>`, once or several times, or the bare answer.
        problem_type: Problem type of the sample; may be empty.
    """
    odd = next((tag for tag in _TAG.findall(solution) if tag not in ("<answer>", "</answer>")), None)
    if odd is not None:
        return f"has the tag {odd}, which is not read; write <answer>..</answer>"
    tags = re.findall("</?answer>", solution)
    if tags != ["<answer>", "</answer>"] * (len(tags) // 2):
        return f"has the tags {' '.join(tags[:6])}, which do not pair; write <answer>..</answer> around each answer"
    kind = rule_name(problem_type)
    if kind not in TEXTS and is_written_list(solution):
        return (
            f"is a list written as a text: {_shown(solution.strip())}; write <answer>..</answer> around each right "
            "answer, or letters that are right together alone (A, C)"
        )
    for text, answer in zip(tagged_texts(solution), reference_answers(solution)):
        reason = _answer_problem(text, answer, kind)
        if reason:
            return reason
    return None


def _answer_problem(text: str, answer: str, kind: str) -> Optional[str]:
    if not answer:
        return f"has an empty answer{f': {_shown(text)}' if text else ''}; write <answer>..</answer> around the answer"
    if _THINK_TAG.search(text):
        return "has a thought inside its answer; put <think>..</think> into 'process'"
    if answer.count(r"\boxed{") > 1:
        return f"has several boxes, of which none is the answer: {_shown(answer)}; write <answer>..</answer> around it"
    if kind in TEXTS:
        return None
    if tag := _OTHER_TAG.search(answer):
        return f"has the tag {tag[0]}, which is not read; write the answer alone in <answer>..</answer>"
    if mark := _BOX_OR_MARK.search(answer):
        return (
            f"has a {mark[0].strip()} that is not read: {_shown(answer)}; write <answer>..</answer> around the answer"
        )
    is_long = _SEVERAL_SENTENCES.search(answer) or "=" in answer or len(answer.split()) > MAX_NUMBER_WORDS
    if kind in NUMBERS and number(answer) is None and (is_long or not re.search(r"\d", answer) or answer[0] == "["):
        return f"is no number but a text: {_shown(answer)}; write the number alone in <answer>..</answer>"
    if kind == MATH and is_long and expression(answer) is None:
        return f"is no expression but a text: {_shown(answer)}; write the expression alone in <answer>..</answer>"
    if kind == MATH and answer.count("{") != answer.count("}"):
        return f"has braces that do not pair: {_shown(answer)}; write the whole expression"
    if _is_working(answer, kind):
        return (
            f"is a worked text that no response can equal: {_shown(answer)}; write the answer alone in "
            "<answer>..</answer> and the working into 'process'"
        )
    return None


def is_written_list(text: str) -> bool:
    """Return True for a list of texts that is written as one text, without tags: "['A', 'C']"."""
    return _LIST_AS_TEXT.fullmatch(text.strip()) is not None


def _is_working(text: str, kind: str) -> bool:
    """Return True if a text is a calculation of several sentences, or ends with "the answer is ..".

    A single phrase "The answer is B" is an answer where the rule reads it, in multiple choice. A description of several
    sentences is an answer for every type.
    """
    if _SEVERAL_SENTENCES.search(text) and _CALCULATION.search(text):
        return True
    *_, last = (None, *_CONCLUSION.finditer(text))
    return (
        last is not None
        and (kind != MULTIPLE_CHOICE or _CONCLUSION_START.fullmatch(text[: last.start()]) is None)
        and len(text[last.end() :].split()) <= MAX_CONCLUSION_WORDS
    )


def outside_options(solution: str, options: Sequence[str]) -> Optional[str]:
    """Return the first reference answer that names none of the options, by letter, content or list, or None."""
    return next((answer for answer in reference_answers(solution) if reference_options(answer, options) is None), None)


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}..")
