"""Rewards on hand cases: answers, format, the rule of each problem type, reading of numbers and letters, weights."""

import random
import time

import pytest

from megatron_ral.config.sections import RewardConfig
from megatron_ral.rewards.answer import (
    accuracy_reward,
    extract_answer,
    format_reward,
    reference_answers,
    taught_response,
)
from megatron_ral.rewards.reading import chart_number, choice, number, plain
from megatron_ral.rewards.rules import RULES, accuracy_by_type, has_rule
from megatron_ral.rewards.score import reward_parts, score_response

GOOD = "<think>red</think><answer>7</answer>"


@pytest.mark.parametrize(
    "response, accuracy, form",
    [
        (GOOD, 1.0, 1.0),
        ("<think>red</think> <answer> 7 </answer>\n", 1.0, 1.0),
        ("<think>red</think><answer>8</answer>", 0.0, 1.0),
        ("<answer>7</answer>", 1.0, 0.0),
        ("7", 0.0, 0.0),
        ("", 0.0, 0.0),
        (GOOD + " and more", 1.0, 0.0),
        (GOOD + "<answer>7</answer>", 0.0, 0.0),
        ("<think>red<answer>7</answer>", 1.0, 0.0),
        ("<think>a</think><think>b</think><answer>7</answer>", 1.0, 0.0),
        ("<think>it may be <answer>7</answer></think><answer>8</answer>", 0.0, 0.0),
        ("<answer><answer>7</answer>", 0.0, 0.0),
        ("<answer>7</answer></answer>", 0.0, 0.0),
        ("</answer>7<answer>", 0.0, 0.0),
        ("<think>red</think><answer>7</answer", 0.0, 0.0),
    ],
)
def test_response(response, accuracy, form):
    assert accuracy_reward(response, "<answer>7</answer>") == accuracy
    assert format_reward(response) == form


@pytest.mark.parametrize("answer", ["Red", "red.", r"\boxed{red}", "the red", ""])
def test_exact_match_is_of_the_text_alone(answer):
    """The paper's rule counts differences as wrong that the rules by type accept."""
    assert accuracy_reward(f"<answer>{answer}</answer>", "<answer>red</answer>") == 0.0
    assert accuracy_reward(f"<answer>{answer}</answer>", answer) == 1.0


def test_without_thinking():
    assert format_reward("<answer>7</answer>", require_think=False) == 1.0
    assert format_reward("\n <answer>7</answer>\n", require_think=False) == 1.0
    assert format_reward(GOOD, require_think=False) == 0.0
    assert format_reward("<answer>7</think></answer>", require_think=False) == 0.0
    assert format_reward("7", require_think=False) == 0.0


def test_several_tags():
    """A response with several tags is unparsed. In a solution each is a reference; supervised training teaches one."""
    for response in (
        "<answer>a</answer><answer>a</answer>",
        "<answer><answer>a</answer>",
        "<answer>a</answer></answer>",
        "</answer>a<answer>",
        "<answer>a",
        "a</answer>",
        "<ANSWER>a</ANSWER>",
        "",
    ):
        assert extract_answer(response) is None, response
    assert extract_answer("<answer></answer>") == ""
    ten = "<answer>cat</answer> <answer> dog </answer><answer>dog</answer>"
    assert reference_answers(ten) == ("cat", "dog", "dog") and reference_answers(" 7 ") == ("7",)
    assert accuracy_reward("<answer>cat</answer>", ten) == 1.0 and accuracy_reward("<answer>cow</answer>", ten) == 0.0
    assert taught_response("", ten) == "<answer>dog</answer>"
    assert taught_response("", "<answer> 7</answer>") == "<answer> 7</answer>"


# --- the rule of each problem type ------------------------------------------------------------------------------------

VIZWIZ = "".join(
    f"<answer>{answer}</answer>"
    for answer in ["coke", "Coke.", "a coke", "cola", "cola", "2 cans", "unanswerable", "don't know", "soda", "can"]
)


@pytest.mark.parametrize(
    "problem_type, answer, solution, reward",
    [
        ("", "Red", "red", 0.0),
        ("", "red", "red", 1.0),
        ("no such type", "B.", "B", 0.0),
        ("exact", "B", "B", 1.0),
        *(
            ("multiple choice", answer, "B", 1.0)
            for answer in (
                "B",
                "b",
                "(B)",
                "(b)",
                "[B]",
                "B.",
                "B)",
                "B:",
                "B. a red ball",
                "(B) a red ball",
                "B) red",
                "B: red",
                "B - red",
                "Option B",
                "The answer is B.",
                "answer: (B)",
                r"\boxed{B}",
                r"$\boxed{\text{(B)}}$",
                "**B**",
                "（B）",
                "B.red",
                "'B'",
                '"B"',
                "B\nred",
            )
        ),
        *(
            ("multiple choice", answer, "B", 0.0)
            for answer in (
                "",
                "A",
                "A. B",
                "A or B",
                "A, B",
                "A/B",
                "AB",
                "(A)(B)",
                "(B) (A)",
                "B) or C)",
                "A red ball",
                "Be",
                "choices",
                "red",
                "B.C. 300",
                "B) C) D)",
                "B. C. D",
                "B\nC",
                "B.\nC.",
                "(B)、(C)",
                "B; C",
                "B. and C",
            )
        ),
        ("multiple choice", "B. X", "B", 1.0),
        ("multiple choice", "B. J. K. Rowling", "B", 1.0),
        ("multiple choice", "B. blue", "(B) red", 1.0),
        ("multiple choice", "A red ball", "A", 0.0),
        ("multiple choice", r"\boxed{\text{red ball}}", "red ball", 1.0),
        ("chartqa", "**China**", "china", 1.0),
        ("chartqa", "many", "100", 0.0),
        ("chartqa", "100", "many", 0.0),
        ("numerical", "-3 km", "3", 0.0),
        ("Multiple-Choice", "Red Ball", "red ball", 1.0),
        ("multiple choice", "blue", "red", 0.0),
        ("multiple_choice", "A,C", "A,C", 1.0),
        ("multiple choice", "A", "A,C", 0.0),
        *(
            ("numerical", answer, "1234.5", 1.0)
            for answer in (
                "1234.5",
                "1,234.5",
                "1,234.50",
                " 1234.5 ",
                "1234.5.",
                "1234.501",
                "1234.5 km/h",
                "$1,234.5",
                "1234.5$",
                "1234.5%",
                r"\boxed{1234.5}",
                r"$1{,}234.5\text{ cm}^2$",
                "١٢٣٤٫٥",
                "１，２３４．５",
                "+1234.5",
                "1.2345e3",
                "1\u202f234.5",
                '"1234.5"',
                "1234.5 square metres",
                "1234.5 m^2",
                "1234.5 m2",
                "1234.5°C",
                r"1234.5^\circ",
            )
        ),
        *(
            ("numerical", answer, "1234.5", 0.0)
            for answer in (
                "",
                "1234",
                "-1234.5",
                "1234.51",
                "1234.5/1",
                "1234.5 or 1234.6",
                "about 1234.5",
                "1234.5-1234.6",
                "nan",
                "12 34.5",
                r"\boxed{1234.5} \boxed{1}",
                "1234.5 times in all these pictures",
            )
        ),
        ("numerical", "−3", "-3", 1.0),
        ("numerical", "3.0", "3", 1.0),
        ("numerical", "50%", "50", 1.0),
        ("numerical", "50%", "0.5", 0.0),
        ("numerical", "1/2", "1/2", 1.0),
        ("numerical", "1/3", "1/2", 0.0),
        *(
            ("numerical", answer, "5", 0.0)
            for answer in (
                "5²",
                "5½",
                "5万",
                "5 million",
                "5 Thousand people",
                "5 and a half",
                "5 or more",
                "5 dozen",
                "5'4",
                "5x3",
                "~5",
            )
        ),
        *(
            ("numerical", answer, "5", 1.0)
            for answer in ("5 pandas", "5 toes", "5 m s-2", "5th", "5 cm²", "5~cm", "5 x")
        ),
        ("numerical", "5 million", "5 million", 1.0),
        ("numerical", "12\u00a03456", "123456", 0.0),
        ("numerical", "1", "1/2", 0.0),
        ("numerical", "inf", "1", 0.0),
        ("numerical", "2.675", "2.67", 1.0),
        ("OCR", "the quick fox", "the quick fox", 1.0),
        ("OCR", "the quick\n fox", "the quick fox", 1.0),
        ("ocr", "the slow fox", "the quick fox", 2 / 3),
        ("OCR", "The quick fox", "the quick fox", 2 / 3),
        ("OCR", "", "fox", 0.0),
        ("OCR", "a b c d e", "fox", 0.0),
        ("OCR", "fox", "", 0.0),
        ("OCR", "", "", 1.0),
        ("free-form", "a red ball", "a red ball", 1.0),
        ("free-form", "red", "red", 2 / 3),
        ("free-form", "", "red", 0.0),
        ("free form", "Running dogs!", "running dog", 1.0),
        ("free-form", "blue", "red", 0.0),
        ("free-form", "红", "红", 0.0),
        ("free-form", "a red", "a red ball", (0.8 + 2 / 3 + 0.8) / 3),
        ("regression", "100", "100", 1.0),
        ("regression", "90", "100", 0.9),
        ("regression", "110 cm", "100", 0.9),
        ("regression", "300", "100", 0.0),
        ("regression", "-90", "-100", 0.9),
        ("regression", "0", "0", 1.0),
        ("regression", "0.1", "0", 0.0),
        ("regression", "many", "100", 0.0),
        ("regression", "", "0", 0.0),
        ("relaxed accuracy", "105", "100", 1.0),
        ("relaxed accuracy", "95", "100", 1.0),
        ("chartqa", "105.1", "100", 0.0),
        ("chartqa", "94.9", "100", 0.0),
        ("ChartQA", "-100", "100", 0.0),
        ("chartqa", "51%", "0.5", 1.0),
        ("chartqa", "50%", "50", 0.0),
        ("chartqa", "1,050", "1000", 1.0),
        ("chartqa", "China", "china", 1.0),
        ("chartqa", "China.", "China", 0.0),
        ("chartqa", "26 years", "25 years", 0.0),
        ("chartqa", "0.0", "0", 1.0),
        ("chartqa", "0.01", "0", 0.0),
        ("chartqa", "", "0", 0.0),
        ("yes/no", "Yes", "yes", 1.0),
        ("yes/no", "No, there is none.", "No", 1.0),
        ("MME", "**yes**", "Yes", 1.0),
        ("yes/no", "yes", "No", 0.0),
        ("yes/no", "not sure", "no", 0.0),
        ("yes/no", "yesterday", "yes", 0.0),
        ("yes/no", "", "no", 0.0),
        ("yes/no", "I say yes", "yes", 0.0),
        ("yes/no", "maybe", "Maybe", 1.0),
        ("vizwiz", "coke", VIZWIZ, 0.9),
        ("vizwiz", "The Coke!", VIZWIZ, 0.9),
        ("vizwiz", "coke", VIZWIZ + "<answer>COKE</answer>", 1.0),
        ("VizWiz", "cola", VIZWIZ, 0.6),
        ("consensus", "two cans", VIZWIZ, 0.3),
        ("vizwiz", "dont know", VIZWIZ, 0.3),
        ("vizwiz", "pepsi", VIZWIZ, 0.0),
        ("vizwiz", "", VIZWIZ, 0.0),
        ("vizwiz", "coke", "coke", 1.0),
        ("vizwiz", "a", "a", 1.0),
        ("vizwiz", "0", "none", 1.0),
        ("vizwiz", "1000", "1,000", 1.0),
        ("vizwiz", "red,dog", "Red dog", 1.0),
        ("vizwiz", "the", "a", 0.0),
        ("vizwiz", "coke", "<answer>Coke.</answer><answer>cola</answer>", 0.5),
        ("numerical", "4", "<answer>3</answer><answer>4</answer>", 1.0),
        ("regression", "95", "<answer>50</answer><answer>100</answer>", 0.95),
    ],
)
def test_rule(problem_type, answer, solution, reward):
    response, wanted = f"<think>?</think><answer>{answer}</answer>", pytest.approx(reward)
    assert accuracy_by_type(response, solution, problem_type) == wanted
    if "<answer>" not in solution:
        assert accuracy_by_type(response, f"<answer> {solution} </answer>", problem_type) == wanted


@pytest.mark.parametrize("problem_type", [*RULES, "vizwiz", ""])
def test_unparsed_responses_get_nothing(problem_type):
    assert accuracy_by_type("<answer>1</answer>", "1", problem_type) > 0.3
    assert accuracy_by_type("1", "1", problem_type) == 0.0
    assert accuracy_by_type("<answer>1</answer><answer>1</answer>", "1", problem_type) == 0.0


def test_names_of_problem_types():
    assert all(map(has_rule, ("multiple choice", "Multiple_Choice", "OCR", "free-form", "yes/no", "VizWiz")))
    assert not has_rule("multiple choise") and not has_rule("")


@pytest.mark.parametrize(
    "text, wanted",
    [
        (r" \boxed{ 5 } ", "5"),
        (r"so it is \boxed{5} then", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{5", r"\boxed{5"),
        ("$5$ and $6$", "$5$ and $6$"),
        (r"\(5\)", "5"),
        (r"5\,000", "5000"),
        (r"5\!000", "5000"),
        (r"\$5", "$5"),
        (r"5\,\text{cm}", "5 cm"),
        ("**5**", "5"),
        (r"50\%", "50%"),
        ("$", "$"),
        ("", ""),
    ],
)
def test_plain_text(text, wanted):
    assert plain(text) == wanted


# What people put in to get through: each must be read in no time, whatever is read.
LONG = [
    "a-1" * 2000,
    "5 " + "a-1" * 30 + "!",
    "$" * 5000,
    r"\boxed{" * 2000,
    r"\boxed{" + "{" * 5000,
    "(A)" * 2000,
    "A. " * 3000,
    "." * 5000,
    "9" * 5000,
    "1," * 3000,
    "**" * 3000,
    "5" + " cm" * 2000,
    "the " * 3000,
    "½" * 100,
    "the answer is " * 500,
    "answer" + " " * 50000 + "xx",
    "A\n" + " " * 50000 + "xx",
    "A. " + "B " * 5000 + "!",
    " " * 5000 + "x",
    "1" + " " * 5000 + "x",
    "\\text{" * 1000,
    "e" * 50 + "5" * 50,
    "answer" + " " * 30000 + "x",
    "B" + "\n" * 30000 + "x",
    "the answer is" + " :" * 5000,
]


def test_no_text_crashes_or_stalls_a_rule():
    rng = random.Random(0)
    alphabet = "AaBb 0159.,-+%$/\\{}()[]*^eE°½²٣５\n<>'\"unkmyeso" + "红\u00a0\u202f\x00"
    texts = LONG + ["".join(rng.choices(alphabet, k=rng.randint(0, 25))) for _ in range(400)]
    for problem_type in [*RULES, "vizwiz"]:
        for text in texts:
            started, solution = time.process_time(), rng.choice(["5", "B", "red ball", "yes", "50%"])
            reward = accuracy_by_type(f"<answer>{text}</answer>", solution, problem_type)
            assert 0.0 <= reward <= 1.0 and time.process_time() - started < 2.0, (problem_type, text[:50])
    assert [number("x" * 200), choice("x" * 200)] == [None, None]
    assert [number("0" * 150 + "5"), chart_number("0" * 150 + "5")] == [None, None], "as long as no number is"


# --- parts and weights ------------------------------------------------------------------------------------------------


def test_unparsed_is_counted_apart_and_carries_no_weight():
    parts = reward_parts(RewardConfig(accuracy_weight=0.9, format_weight=0.1))
    score = score_response("no tags", "<answer>7</answer>", "", parts)
    assert (score.reward, score.components["unparsed"], score.components["error"]) == (0.0, 1.0, 0.0)
    assert [problem.partition(":")[0] for problem in score.problems] == ["unparsed"]
    score = score_response(GOOD, "<answer>7</answer>", "", parts)
    assert score.reward == pytest.approx(1.0)
    assert score.components == {"unparsed": 0.0, "error": 0.0, "accuracy": 1.0, "format": 1.0} and not score.problems
    wrong = score_response("<think>x</think><answer>8</answer>", "<answer>7</answer>", "", parts)
    assert wrong.reward == pytest.approx(0.1) and wrong.components["unparsed"] == 0.0


def test_settings_choose_the_rule_the_weights_and_the_format():
    response, solution = "<answer>(b)</answer>", "<answer>B</answer>"
    for settings, reward in [
        ({}, 0.0),
        ({"accuracy": "by_type"}, 0.9),
        ({"require_think": False}, 0.1),
        ({"accuracy": "by_type", "accuracy_weight": 2.0, "format_weight": 0.5, "require_think": False}, 2.5),
    ]:
        score = score_response(response, solution, "multiple choice", reward_parts(RewardConfig(**settings)))
        assert score.reward == pytest.approx(reward), settings
