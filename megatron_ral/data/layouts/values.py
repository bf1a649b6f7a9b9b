"""Single fields of a record: texts, answers, options and boxes, whatever wrote them (JSON, Arrow, pandas, numpy)."""

import math
import re
from decimal import Decimal
from typing import Any, Optional, Sequence

from megatron_ral.data.issues import SampleError
from megatron_ral.rewards.options import option_letter
from megatron_ral.rewards.problem_types import rule_name
from megatron_ral.rewards.references import is_written_list

Answer = str | int | float | bool
ID_FIELDS = ("problem_id", "id", "question_id")
SYSTEM_FIELDS = ("system", "system_prompt")
OPTION_FIELDS = ("options", "candidates", "choices")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ANSWER_FIELDS = ("answer", "answers", "label", "solution", "ground_truth")
"""Fields that hold the reference answer in one layout or another."""
_SHOWN = 60
_OWN_LETTER = re.compile(r"\s*\(?([A-Z])(?:\)|[.:]\s)\s*\S")
_OWN_NUMBER = re.compile(r"\s*\(?[0-9]{1,2}(?:\)|[.:]\s)\s*\S")
_LONE_LETTER = re.compile(r"\s*(?:<answer>)?\s*\(?([A-Za-z])\)?[.:]?\s*(?:</answer>)?\s*")
_ONE_OPTION = re.compile(
    r"(?:(?:option|choice|candidate|opt?)[ _-]?)?[a-h]|(?:(?:option|choice|candidate|opt?)[ _-]?|a)[0-9]{1,2}",
    re.IGNORECASE,
)
_OPTION_LIST = re.compile("option|choice|candidate", re.IGNORECASE)
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


def with_system(question: str, record: dict) -> str:
    """Return a question after the record's text of the system, if it has one."""
    system = first(record, SYSTEM_FIELDS)
    return f"{system}\n{question}" if isinstance(system, str) and system.strip() else question


def record_id(record: Any) -> Optional[str]:
    """Return the record's own name, or None if it has none."""
    for name in ID_FIELDS:
        if isinstance(record, dict) and isinstance(record.get(name), (str, int)) and str(record[name]).strip():
            return str(record[name]).strip()
    return None


def answer_of(record: dict, *names: str) -> Answer:
    """Return the first of several fields that says something; several right answers as one text, each in a tag.

    Raises:
        SampleError: none does, or it holds something else than an answer.
    """
    for name in names:
        value = record.get(name)
        if not (is_empty(value) or (isinstance(value, str) and not value.strip())):
            return _answer(value, name)
    raise SampleError(f"no field '{names[0]}'", "missing_field")


def _answer(value: Any, name: str) -> Answer:
    if isinstance(value, list):
        several: list[Any] = [item.get("answer") if isinstance(item, dict) else item for item in value]
        if not all(_is_answer(item) and not isinstance(item, bool) for item in several):
            raise SampleError(f"'{name}' must be a list of texts", "wrong_field")
        if len(several) > 1 and not all(isinstance(item, str) for item in several):
            raise SampleError(
                f"'{name}' = {shown(value)} is a list of numbers, one answer or several; write it as text, or "
                "<answer>..</answer> around each if one is enough",
                "wrong_field",
            )
        value = several[0] if len(several) == 1 else "".join(map(solution_text, several))
    if not _is_answer(value):
        raise SampleError(
            f"'{name}' = {shown(value)} is no answer; it must be a text, a number, true or false, or a list of texts",
            "wrong_field",
        )
    # A solution is refused where all solutions are read (`reference_problem`), with the same way out.
    if isinstance(value, str) and name != "solution" and is_written_list(value):
        raise SampleError(
            f"'{name}' = {shown(value)} is a list written as text; give a list, or put <answer>..</answer> around a "
            "text that is meant itself",
            "wrong_field",
        )
    return value


def _is_answer(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and bool(str(value).strip()) and value not in (math.inf, -math.inf)


def refuse_several(record: dict, options: list[str]) -> None:
    """Raise SampleError for a list of answers to a question with options: right together, or each alone?"""
    for name in ANSWER_FIELDS:
        value = record.get(name)
        if options and isinstance(value, list) and len(set(map(str, value))) > 1:
            letters = [str(item) for item in value]
            raise SampleError(
                f"'{name}' = {shown(letters)} is a list of answers to a question with options; write "
                f"{shown(', '.join(letters))} if they are right together, or <answer>..</answer> around each if one is "
                "enough",
                "wrong_field",
            )


def solution_text(answer: Answer) -> str:
    """Return an answer in the tags that the rewards read. A list written as text stays without, and is refused.

    A whole float is written as an integer, because a column of integers with gaps comes as floats.
    """
    if isinstance(answer, float) and answer.is_integer() and abs(answer) < _LARGEST_WHOLE:
        answer = int(answer)
    text = str(answer)
    return text if "<answer>" in text or is_written_list(text) else f"<answer>{text}</answer>"


def options_of(record: dict) -> list[str]:
    """Return the options of a record: a list, an object of letters, or the columns A, B, ..; empty if there are none.

    Raises:
        SampleError: they are not texts or numbers, more than there are letters, lettered in another order, or stand in
            fields that are not read.
    """
    stated = first(record, OPTION_FIELDS)
    if isinstance(stated, dict):
        letters = {name.upper(): value for name, value in stated.items() if not is_empty(value)}
        options: Any = (set(letters) <= set(LETTERS) and _lettered(letters)) or ([] if not letters else None)
    else:
        options = _lettered(record) if stated is None else stated
    if not isinstance(options, list) or not all(_is_answer(option) and type(option) is not bool for option in options):
        raise SampleError(
            f"'options' must be a list of texts, or an object of the letters A, B, .., not {shown(stated)}",
            "wrong_field",
        )
    if len(options) > len(LETTERS):
        raise SampleError(f"{len(options)} options are more than there are letters", "wrong_field")
    if not options:
        _refuse_other_options(record)
    options = [option if isinstance(option, str) else _number_text(option) for option in options]
    own = [match[1] for option in options if (match := _OWN_LETTER.match(option))]
    if sorted(own) == list(LETTERS[: len(options)]) != own:
        raise SampleError(
            f"the options have the letters {', '.join(own)}; put them in the order of the letters", "wrong_field"
        )
    return options


def _lettered(record: dict) -> list:
    """Return the values of the fields A, B, ..; none if there are no two of them.

    Raises:
        SampleError: a letter between them has no value.
    """
    given = [letter for letter in LETTERS if not is_empty(record.get(letter))]
    if len(given) < 2 or given[0] not in "AB":
        return []
    if given != list(LETTERS[: len(given)]):
        raise SampleError(
            f"its options have the letters {', '.join(given)}, with a gap; letter them anew, the answer too",
            "wrong_field",
        )
    return [record[letter] for letter in given]


def _refuse_other_options(record: dict) -> None:
    """Raise SampleError for fields that look like options and are not read: the question would lose them."""
    names = [
        name
        for name, value in record.items()
        if isinstance(value, str) and value.strip() and _ONE_OPTION.fullmatch(name)
    ]
    lists = [
        name
        for name, value in record.items()
        if isinstance(value, (list, dict)) and len(value) > 1 and _OPTION_LIST.search(name)
    ]
    if len(names) > 1 or lists:
        raise SampleError(
            f"the fields {', '.join(map(shown, lists or names))} seem to be options, which are read from "
            f"{', '.join(OPTION_FIELDS)} or the fields A, B, ..; rename or remove them",
            "wrong_field",
        )


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
    if not options:
        return answer
    if isinstance(answer, str):
        _refuse_other_letter(answer, options)
        return answer
    number = int(answer) if isinstance(answer, int) or answer.is_integer() else None
    if all(map(_OWN_NUMBER.match, options)):
        raise SampleError(
            f"the answer {shown(answer)} may count from 0 or be a number of the options' own ({shown(options[0])}); "
            "write it as a letter",
            "wrong_field",
        )
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


def _refuse_other_letter(answer: str, options: list[str]) -> None:
    """Raise SampleError for a letter that is one option's letter and another's text."""
    found = _LONE_LETTER.fullmatch(answer)
    letter = found[1].upper() if found else ""
    texts = [text.upper() for text in bare(options)]
    if letter and letter in LETTERS[: len(options)] and letter in texts and texts[LETTERS.index(letter)] != letter:
        raise SampleError(
            f"the answer {letter} is the letter of option {letter} and the text of option "
            f"{LETTERS[texts.index(letter)]}; write the number of the option, counted from 0",
            "wrong_field",
        )


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
