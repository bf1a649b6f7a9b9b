"""Accuracy by problem type: each rule takes an answer and a reference answer and returns a number in [0, 1].

The code is our own, written to the published rules; each docstring names its departures. Sources:
- Video-R1: tulerfeng/Video-R1 at 59d65c3, src/r1-v/src/open_r1/grpo.py, `accuracy_reward`.
- ChartQA: google-research/pix2struct at 5b086ef, pix2struct/metrics.py, `relaxed_correctness`.
- MME: BradyFU/Awesome-Multimodal-Large-Language-Models at 1c1d69e, tools/eval_tool.zip, eval_tool/calculation.py,
  `parse_pred_ans`.
- VizWiz: the VQA measure, GT-Vision-Lab/VQA at a013f00, PythonEvaluationTools/vqaEvaluation/vqaEval.py.
- Math: the library math-verify.
"""

import math
import re
from functools import lru_cache
from typing import Callable, Mapping, Optional, Sequence

import jiwer
from rouge_score.rouge_scorer import RougeScorer

from megatron_ral.rewards.answer import extract_answer, reference_answers
from megatron_ral.rewards.mathematics import expression
from megatron_ral.rewards.options import chosen_options, comparable, reference_options
from megatron_ral.rewards.problem_types import MATH, MULTIPLE_CHOICE, rule_name
from megatron_ral.rewards.process import CallFailed, CallTimeout, FunctionProcess
from megatron_ral.rewards.reading import bare_number, chart_number, first_word, number, plain, without_group_marks

Rule = Callable[[str, str], float]

SMALL_REFERENCE, SMALL_TOLERANCE = 0.01, 0.01
"""Size of a reference below which numbers are compared relative to it, and the largest relative difference of these."""
MATH_SECONDS, MATH_WAIT = 5.0, 30.0
"""Limits of one comparison by math-verify: its processor time, and the wait for it on a machine under load."""
RELAXED_TOLERANCE = 0.05
CONSENSUS = 3
"""Equal answers of other annotators that make an answer right."""

_ROUGE = ("rouge1", "rouge2", "rougeL")
_NUMBER_WORDS = {
    word: str(value)
    for value, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_MATH = FunctionProcess(memory_gib=4)


def exact(answer: str, reference: str) -> float:
    """Return 1 if both are the same text (the paper)."""
    return float(answer == reference)


def _same_text(answer: str, reference: str) -> float:
    return float(plain(answer).casefold() == plain(reference).casefold())


def multiple_choice(answer: str, reference: str, options: Sequence[str] = ()) -> float:
    """Return 1 if both name the same option or the same set of options, or are the same text.

    Source: Video-R1, where only the same stripped text is right. Departures: case, brackets and marks make no
    difference here, nor does the content of an option in place of its letter or beside it; a reference that lists
    several letters is a set ("A, C", "AC", "A and C").

    Args:
        answer: Answer.
        reference: Letter, list of letters, or content of an option.
        options: Contents of the sample's options; empty where they are not known.
    """
    if _same_text(answer, reference) or (comparable(answer) == comparable(reference) != ""):
        return 1.0
    wanted = reference_options(reference, options)
    if wanted is None:
        wanted, options = reference_options(reference), ()
    return float(wanted is not None and chosen_options(answer, options, len(wanted) > 1) == wanted)


def numerical(answer: str, reference: str) -> float:
    """Return 1 if both numbers are equal when rounded to two decimals.

    Source: Video-R1. An answer is wrong there if only one side has a point or a comma ("3" against "3.0", "1,000"
    against "1000"), or if `float` does not read it. Departures: units are dropped, and a reference that is no number
    ("1/2") is compared as text. Next to a reference below 0.01 in size, which rounds to 0.00 or 0.01, an answer may
    differ by 1 %; next to 0 it has to be 0.
    """
    wanted = number(reference)
    if wanted is None:
        return _same_text(answer, reference)
    value = number(answer)
    if value is None:
        return 0.0
    if abs(wanted) < SMALL_REFERENCE:
        return float(math.isclose(value, wanted, rel_tol=SMALL_TOLERANCE))
    return float(round(value, 2) == round(wanted, 2))


def mathematics(answer: str, reference: str) -> float:
    """Return 1 if both are the same number, the same text, or the same mathematical object by math-verify.

    A unit is dropped where it is a word ("5 apples") or a usual one ("5 cm", "5 m/s"). Other letters behind a number
    are symbols: "5x" is not 5. The library runs in a process of its own.

    Raises:
        CallTimeout: The comparison takes more than MATH_SECONDS of processor time.
        CallFailed: The library failed, or needed more than 4 GiB.
    """
    given, known = expression(answer), expression(reference)
    value, wanted = _math_number(answer, given), _math_number(reference, known)
    if wanted is not None and value is not None and math.isclose(value, wanted):
        return 1.0
    if _same_text(*(re.sub(r"_\{(\w+)\}", r"_\1", text) for text in (answer, reference))):
        return 1.0
    if given is None or known is None:
        return 0.0
    return _MATH.call(
        "megatron_ral.rewards.math_verifier:equal", given, known, seconds=MATH_WAIT, cpu_seconds=MATH_SECONDS
    )


def _math_number(text: str, latex: Optional[str]) -> Optional[float]:
    return number(text) if latex is None else bare_number(text)


def regression(answer: str, reference: str) -> float:
    """Return 1 - |answer - reference| / |reference|, at least 0; numbers are read as in `numerical`.

    Source: Video-R1, which adds 1e-9 above and below, so that an exact answer gets 1e-9 / |reference| less than 1, and
    0 if the reference is 0. Departure: an exact answer gets 1.
    """
    wanted = number(reference)
    if wanted is None:
        return _same_text(answer, reference)
    value = number(answer)
    if value is None or wanted == 0:
        return float(value == wanted)
    return max(0.0, 1.0 - abs(value - wanted) / abs(wanted))


def transcription(answer: str, reference: str) -> float:
    """Return 1 - word error rate, at least 0; white space separates words, and case counts.

    Source: Video-R1 (problem type OCR).
    """
    return max(0.0, 1.0 - jiwer.wer(" ".join(reference.split()), " ".join(answer.split())))


@lru_cache(maxsize=1)
def _rouge() -> RougeScorer:
    return RougeScorer(_ROUGE, use_stemmer=True)


def free_form(answer: str, reference: str) -> float:
    """Return the mean F measure of ROUGE-1, ROUGE-2 and ROUGE-L with stemming.

    ROUGE reads only the letters a-z and digits: text in other scripts always gets 0. A single word has no ROUGE-2 and
    gets 2 / 3 at most.

    Source: Video-R1.
    """
    scores = _rouge().score(reference, answer)
    return sum(scores[name].fmeasure for name in _ROUGE) / len(_ROUGE)


def is_rouge_blind(solution: str, problem_type: str) -> bool:
    """Return True if the rule of a sample is `free_form`, which reads nothing of its reference answers."""
    is_free_form = RULES.get(rule_name(problem_type)) is free_form
    return is_free_form and not any(re.search("[a-z0-9]", text.lower()) for text in reference_answers(solution))


def relaxed_accuracy(answer: str, reference: str) -> float:
    """Return 1 if numbers differ by at most 5 % of the reference, or other text is the same but for case.

    "50%" is 0.5, and units are not dropped, so that category names stay text.

    Source: ChartQA. Departures: commas between groups of three digits are dropped, and a reference of 0 is a number
    ("0.0" is right).
    """
    wanted, value = chart_number(reference), chart_number(answer)
    if wanted is None or value is None:
        return _same_text(answer, reference)
    return float(abs(value - wanted) / abs(wanted) <= RELAXED_TOLERANCE if wanted else value == 0)


def yes_or_no(answer: str, reference: str) -> float:
    """Return 1 if the first word of the answer is the reference, yes or no.

    Source: MME, which searches the first four characters for "yes" and "no", so that "not sure", "none" and "yesterday"
    mean no, no and yes. Departure: they mean neither here.
    """
    wanted = first_word(reference)
    return float(first_word(answer) == wanted) if wanted in ("yes", "no") else _same_text(answer, reference)


def consensus(answer: str, references: Sequence[str]) -> float:
    """Return the mean over reference answers of min(number of the *other* ones equal to the answer / 3, 1).

    With ten references, 0, 1, 2, 3 and 4 equal ones give 0, 0.3, 0.6, 0.9 and 1. With at most three references, the
    result is the share of equal ones. Both sides are normalised: lower case, number words as digits, without articles,
    apostrophes and marks.

    Source: VQA. Departures: apostrophes are dropped, where contractions are repaired there; answers are normalised even
    if all ten references are the same; commas are dropped between groups of three digits alone ("3,14" is not 314).
    """
    answer, count = _consensus_text(answer), len(references)
    matches = sum(_consensus_text(reference) == answer for reference in references)
    if count <= CONSENSUS:
        return matches / count
    without_equal, without_other = min(1.0, max(0, matches - 1) / CONSENSUS), min(1.0, matches / CONSENSUS)
    return (matches * without_equal + (count - matches) * without_other) / count


def _consensus_text(text: str) -> str:
    text = plain(text).casefold()
    bare = re.sub(r"['’]|\.(?!\d)", "", without_group_marks(text))
    words = re.sub(r"""[;/\[\]"{}()=+\\_\-><@`,?!]""", " ", bare).split()
    return " ".join(_NUMBER_WORDS.get(word, word) for word in words if word not in _ARTICLES) or text


RULES: Mapping[str, Rule] = {
    "exact": exact,
    MULTIPLE_CHOICE: multiple_choice,
    "numerical": numerical,
    "ocr": transcription,
    "free form": free_form,
    "regression": regression,
    "relaxed accuracy": relaxed_accuracy,
    "chartqa": relaxed_accuracy,
    "yes no": yes_or_no,
    "mme": yes_or_no,
    MATH: mathematics,
}
"""Rule of each problem type, in the spelling of `rule_name`. "consensus" and "vizwiz" are apart, because their rule
takes all reference answers at once."""
_CONSENSUS_TYPES = ("consensus", "vizwiz")


def has_rule(problem_type: str) -> bool:
    """Return True if a problem type has a rule of its own; the answers of others are matched exactly."""
    return rule_name(problem_type) in RULES or rule_name(problem_type) in _CONSENSUS_TYPES


def accuracy_by_type(response: str, solution: str, problem_type: str, options: Sequence[str] = ()) -> float:
    """Return the accuracy by the rule of the problem type, in [0, 1].

    A problem type without a rule is matched exactly. The best of several reference answers counts. An unparsed response
    gets 0, as does an answer whose comparison takes too long.

    Args:
        response: generated text.
        solution: `<answer>..</answer>`, once or several times, or the bare answer.
        problem_type: problem type of the sample in any spelling that `rule_name` unifies.
        options: contents of the options of a multiple choice; empty where they are not known.
    """
    try:
        return decided_accuracy(response, solution, problem_type, options)
    except (CallTimeout, CallFailed):
        return 0.0


def decided_accuracy(response: str, solution: str, problem_type: str, options: Sequence[str] = ()) -> float:
    """Return the same as `accuracy_by_type`, but raise where no comparison with a reference was decided.

    Raises:
        CallTimeout, CallFailed: No reference is right, and the comparison with one of them failed.
    """
    answer, references = extract_answer(response), reference_answers(solution)
    if answer is None:
        return 0.0
    if rule_name(problem_type) in _CONSENSUS_TYPES:
        return consensus(answer, references)
    rule, best, failure = RULES.get(rule_name(problem_type), exact), 0.0, None
    for reference in references:
        try:
            value = multiple_choice(answer, reference, options) if rule is multiple_choice else rule(answer, reference)
        except (CallTimeout, CallFailed) as error:
            failure = error
        else:
            best = max(best, value)
    if failure is not None and best == 0.0:
        raise failure
    return best
