"""Single fields of a record: texts, answers, options and boxes, whatever wrote them (JSON, Arrow, pandas, numpy)."""

import math
import re
from decimal import Decimal
from typing import Any, Optional, Sequence, cast

from megatron_ral.data.issues import SampleError
from megatron_ral.rewards.options import option_letter
from megatron_ral.rewards.problem_types import rule_name

Answer = str | int | float | bool
ID_FIELDS = ("problem_id", "id", "question_id")
OPTION_FIELDS = ("options", "candidates", "choices")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SHOWN = 60
_LARGEST_WHOLE = 2**53
"""Whole floats below it are integers without loss."""
_YES_OR_NO = ("yes no", "mme")
_WORDS = {True: ("true", "yes", "correct", "right"), False: ("false", "no", "incorrect", "wrong")}


def plain(value: Any) -> Any:
    """Return a value with numpy's and Arrow's types as those of JSON, or bytes; NaN, pandas' missing value, is None."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, float):
        return None if math.isnan(value) else value
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def is_empty(value: Any) -> bool:
    """Return True for a field that is there and says nothing, as all fields of all rows are in a column store."""
    return value is None or (isinstance(value, (str, bytes, list, dict)) and not value)


def shown(value: Any) -> str:
    """Return a value as it stands in a message: at most 60 characters of one line."""
    text = repr(value) if isinstance(value, str) else " ".join(str(value).split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 2] + ".."


def first(record: dict, names: Sequence[str]) -> Any:
    """Return the first of several fields that exists and is not empty."""
    return next((record[name] for name in names if not is_empty(record.get(name))), None)


def text_of(record: dict, *names: str) -> str:
    """Return the first of several fields that is a text.

    Raises:
        SampleError: none is.
    """
    for name in names:
        if isinstance(record.get(name), str) and record[name].strip():
            return record[name]
    raise SampleError(f"no text field '{names[0]}'", "missing_field")


def record_id(record: Any) -> Optional[str]:
    """Return the record's own name, or None if it has none."""
    for name in ID_FIELDS:
        if isinstance(record, dict) and isinstance(record.get(name), (str, int)) and str(record[name]).strip():
            return str(record[name]).strip()
    return None


def answer_of(record: dict, *names: str) -> Answer:
    """Return the first of several fields that holds an answer; several right answers as one text, each in a tag.

    Raises:
        SampleError: none does, or a list holds something else than texts and numbers.
    """
    for name in names:
        value: Any = record.get(name)
        if isinstance(value, list) and value:
            several: list[Any] = [item.get("answer") if isinstance(item, dict) else item for item in value]
            if not all(_is_answer(item) and not isinstance(item, bool) for item in several):
                raise SampleError(f"'{name}' must be a list of texts", "wrong_field")
            value = several[0] if len(several) == 1 else "".join(map(solution_text, several))
        if _is_answer(value):
            return cast(Answer, value)
    raise SampleError(f"no field '{names[0]}'", "missing_field")


def _is_answer(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and bool(str(value).strip())


def solution_text(answer: Answer) -> str:
    """Return an answer in the tags that the rewards read.

    A whole float is written as an integer, because a column of integers with gaps comes as floats.
    """
    if isinstance(answer, float) and answer.is_integer() and abs(answer) < _LARGEST_WHOLE:
        answer = int(answer)
    return str(answer) if "<answer>" in str(answer) else f"<answer>{answer}</answer>"


def options_of(record: dict) -> list[str]:
    """Return the options of a record: a list, an object of letters, or the columns A, B, ..; empty if there are none.

    Raises:
        SampleError: they are not texts or numbers, or more than there are letters.
    """
    options = first(record, OPTION_FIELDS) or _lettered(record) or []
    if isinstance(options, dict):
        options = _lettered(options) if len(options) == len(_lettered(options)) else None
    if not isinstance(options, list) or not all(_is_answer(option) and type(option) is not bool for option in options):
        raise SampleError("'options' must be a list of texts", "wrong_field")
    if len(options) > len(LETTERS):
        raise SampleError(f"{len(options)} options are more than there are letters", "wrong_field")
    return [option if isinstance(option, str) else _number_text(option) for option in options]


def _lettered(record: dict) -> list:
    """Return the values of the fields A, B, .. up to the first that is empty; none if there is no B."""
    values = []
    for letter in LETTERS:
        if is_empty(record.get(letter)):
            break
        values.append(record[letter])
    return values if len(values) > 1 else []


def _number_text(number: int | float) -> str:
    return str(int(number)) if isinstance(number, float) and number.is_integer() else str(number)


def bare(options: list[str]) -> list[str]:
    """Return the options without their letters, if all have one ("A.M." alone has none)."""
    found = [
        re.fullmatch(rf"\s*\(?{letter}[.):]\s*(.*)", option, re.DOTALL) for letter, option in zip(LETTERS, options)
    ]
    return [match[1].strip() for match in found if match] if all(found) else [option.strip() for option in options]


def settled(answer: Answer, options: list[str], problem_type: str) -> str | int | float:
    """Return the answer that a JSON boolean or the number of an option stands for; other answers as they are.

    Options are counted from 0. A boolean is the option that says it, `yes` or `no` to a question of such a type, and
    otherwise the text `true` or `false`.

    Raises:
        SampleError: a number that is one option's text and another's number, or an answer that is no option.
    """
    if isinstance(answer, bool):
        if options:
            return _option_that_says(answer, options)
        return _WORDS[answer][rule_name(problem_type) in _YES_OR_NO]
    if not options or isinstance(answer, str):
        return answer
    number = int(answer) if isinstance(answer, int) or answer.is_integer() else None
    named = [LETTERS[place] for place, text in enumerate(bare(options)) if _as_number(text) == answer]
    counted = LETTERS[number] if number is not None and 0 <= number < len(options) else None
    if counted is not None and named and named != [counted]:
        raise SampleError(
            f"the answer {shown(answer)} is the text of option {named[0]} and, counted from 0, the number of option "
            f"{counted}; write it as a letter, or as text in quotes",
            "wrong_field",
        )
    if counted is None and not named:
        raise SampleError(f"answer {shown(answer)} is none of the {len(options)} options", "answer_not_in_options")
    return counted or named[0]


def _as_number(text: str) -> Optional[float]:
    try:
        return float(text)
    except ValueError:
        return None


def _option_that_says(answer: bool, options: list[str]) -> str:
    says = [letter for letter, text in zip(LETTERS, bare(options)) if text.rstrip(".").casefold() in _WORDS[answer]]
    if len(says) != 1:
        raise SampleError(
            f"the answer {str(answer).lower()} is none of the {len(options)} options; write it as a letter",
            "answer_not_in_options",
        )
    return says[0]


def lettered_answer(answer: Answer, options: list[str]) -> Answer:
    """Return the letter of the option that a text names, or the answer as it is."""
    return option_letter(answer, options) or answer if options and isinstance(answer, str) else answer


def corners(boxes: Any) -> list[list[float]]:
    """Convert [x, y, width, height] to [x0, y0, x1, y1].

    Raises:
        SampleError: something else is given.
    """
    boxes = [boxes] if isinstance(boxes, list) and boxes and not isinstance(boxes[0], list) else boxes
    try:
        return [[x, y, x + width, y + height] for x, y, width, height in (map(float, box) for box in boxes)]
    except (TypeError, ValueError, OverflowError):
        raise SampleError("'bbox' must be a list of [x, y, width, height]", "target_box") from None
