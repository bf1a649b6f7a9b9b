"""Answers as people and models write them: the reward of each by the public score functions."""

import pytest

from megatron_ral.config.sections import RewardConfig
from megatron_ral.rewards.options import chosen_options, option_letter, options_in_question, reference_options
from megatron_ral.rewards.reading import chart_number, number
from megatron_ral.rewards.rules import accuracy_by_type, mathematics
from megatron_ral.rewards.score import reward_parts, score_response

COLOURS = ("green", "red", "blue", "a red and blue ball")
BY_TYPE = RewardConfig(accuracy="by_type")


def accuracy(problem_type: str, answer: str, solution: str, options=()) -> float:
    score = score_response(
        f"<think>?</think><answer>{answer}</answer>", solution, problem_type, reward_parts(BY_TYPE), options
    )
    assert not score.problems
    return score.components["accuracy"]


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, reference, right",
    [
        ("3,14", "314", 0),
        ("1,2", "12", 0),
        ("1_5", "15", 0),
        ("1_000", "1000", 0),
        ("1__0", "10", 0),
        ("0,123", "123", 0),
        ("0,123", "0.123", 0),
        ("3,14", "3.14", 0),
        ("1234,567", "1234567", 0),
        ("1,23,456", "123456", 0),
        ("12,34", "1234", 0),
        ("1,2345", "12345", 0),
        ("1,234,5", "12345", 0),
        ("1.234,5", "1234.5", 0),
        (",5", "5", 0),
        ("5,,000", "5000", 0),
        ("3, 4", "34", 0),
        (r"3{,}14", "314", 0),
        (r"3\,14", "314", 0),
        (r"1234\,567", "1234567", 0),
        ("1234\u202f567", "1234567", 0),
        ("1,234\u202f567", "1234567", 0),
        ("３，１４", "314", 0),
        ("٣٬١٤", "314", 0),
        ("3,14", "3,14", 1),
        ("1,000", "1000", 1),
        ("1,234,567.8", "1234567.8", 1),
        ("-12,345", "-12345", 1),
        ("$1,234.50", "1234.5", 1),
        ("1,000,", "1000", 1),
        ("1,000 km, about", "1000", 1),
        (r"1{,}000{,}000", "1000000", 1),
        (r"1\,000\,000", "1000000", 1),
        ("1\u202f000\u202f000", "1000000", 1),
        ("١٬٠٠٠", "1000", 1),
        ("１，０００", "1000", 1),
        ("१२", "12", 1),
        ("1000", "1,000", 1),
    ],
)
def test_commas_stand_between_groups_of_three_digits_and_underscores_nowhere(answer, reference, right):
    assert accuracy("numerical", answer, reference) == right
    if right == 0 and reference != "0.123":
        assert accuracy("chartqa", answer, reference) == 0.0
        assert accuracy("math", answer, reference) == 0.0
        assert accuracy("regression", answer, reference) < 1.0
    if right == 0 and answer[0] != ",":  # a mark before an answer is dropped there
        assert accuracy("vizwiz", answer, reference) == 0.0


def test_readers_of_numbers_agree_on_commas():
    for text, value in [("1,050", 1050.0), ("10,50", None), ("1_0", None), ("1,050,000", 1050000.0), ("01,050", None)]:
        assert (number(text), chart_number(text)) == (value, value), text
    assert chart_number("1,050%") == 10.5 and chart_number("1,5%") is None


@pytest.mark.parametrize(
    "answer, reference, right",
    [
        ("0.001", "0.004", 0),
        ("0.004", "0.001", 0),
        ("0", "0.004", 0),
        ("0.005", "0.0049", 0),
        ("0.0033", "0.003333", 1),
        ("0.00404", "0.004", 1),
        ("0.00405", "0.004", 0),
        ("-0.004", "0.004", 0),
        ("-0.004", "-0.004", 1),
        ("4e-3", "0.004", 1),
        ("1e-9", "2e-9", 0),
        ("1e-9", "1e-9", 1),
        ("0.0", "0", 1),
        ("-0", "0", 1),
        ("0.004", "0", 0),
        ("0.009", "0.01", 1),  # 0.01 rounds like the larger ones, as in Video-R1
        ("0.014", "0.01", 1),
        ("0.016", "0.01", 0),
        ("0.0098", "0.0099", 0),
    ],
)
def test_small_references_are_compared_relative_to_them(answer, reference, right):
    assert accuracy("numerical", answer, reference) == right


@pytest.mark.parametrize(
    "answer, right",
    [
        *(
            (answer, 1)
            for answer in ("5", "5.", "+5", "05", "5 K", "5 mm", "5 MB", "5m", "$5", "5 %", "5 apples", "5x")
        ),
        *((answer, 0) for answer in ("5k", "5K", "5 M", "5M", "5B", "5bn", "5 mil", "5 mn", "$5M", "5T", "5 million")),
        *((answer, 0) for answer in ("5π", r"5\pi", "5 pi", "5i", "5e", "5!", "5 squared", "5 tenths", "5 halves")),
        *(
            (answer, 0)
            for answer in ("[5]", "(5)", "~5", "≈5", "about 5", "x=5", "five", "5/1", "5:00", "5 6", "9" * 5000)
        ),
    ],
)
def test_scales_symbols_and_words_are_no_units(answer, right):
    assert accuracy("numerical", answer, "5") == right
    assert accuracy("numerical", "5", answer) <= right


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, reference, right",
    [
        *(
            (answer, "B", 1)
            for answer in ("red", "Red.", "**RED**", " red ", "B. red", "(B) Red", "B: red", "B red", "b) red")
        ),
        *(
            (answer, "B", 1)
            for answer in ("The answer is red.", "Answer: red", "Option B: red", r"\text{red}", '"red"')
        ),
        *((answer, "B", 1) for answer in ("B", "b", "(b)", "B. crimson")),
        *((answer, "red", 1) for answer in ("B", "(b)", "B. red", "red")),
        *((answer, "B. red", 1) for answer in ("B", "red", "(B)")),
        *(
            (answer, "B", 0)
            for answer in ("blue", "C. blue", "B. blue", "A. red", "E. red", "reddish", "redred", "not red")
        ),
        *((answer, "B", 0) for answer in ("", "E", "red, blue", "red or blue", "B, C", "it")),
        ("a red and blue ball", "D", 1),
        ("D. a red and blue ball", "D", 1),
        ("A red and blue ball", "A", 0),
        *(
            (answer, "B", 1)
            for answer in (
                "*B*",
                "***B***",
                "_B_",
                "“B”",
                "<B>",
                "(B.)",
                "B,",
                "B!",
                "red (B)",
                "My answer is B",
                "B, red",
            )
        ),
        *(
            (answer, "B", 1)
            for answer in ("The answer is option B.", "The final answer is (B)", "B. because it is red")
        ),
        *(
            (answer, "B", 0)
            for answer in ("B. red, C. blue", "B. red\nC. blue", "B) red C) blue", "B. red and C. blue")
        ),
        *(
            (answer, "B", 0)
            for answer in ("B. red or blue", "B. red; blue", "B. A", "B: C", "A. green\nB. red", "Not B", "B?")
        ),
        *((answer, "B", 0) for answer in ("blue (B)", "B blue", "not (B)", "~B", "B-", "B+", "red and (C)")),
    ],
)
def test_the_content_of_an_option_names_it(answer, reference, right):
    assert accuracy("multiple choice", answer, f"<answer>{reference}</answer>", COLOURS) == right


def test_options_with_letters_of_their_own_and_special_contents():
    assert accuracy("multiple choice", "red", "B", ("A. green", "B. red")) == 1.0
    assert accuracy("multiple choice", "red", "B", ("(A) green", "(B) red")) == 1.0
    assert accuracy("multiple choice", "4", "C", ("2", "3", "4")) == 1.0
    assert accuracy("multiple choice", "C", "C", ("B", "C", "A")) == 1.0, "a letter goes before a content that is one"
    assert accuracy("multiple choice", "red", "A", ("red", "blue", "red")) == 1.0
    assert accuracy("multiple choice", "red", "C", ("red", "blue", "red")) == 1.0, "options of one content are one"
    assert accuracy("multiple choice", "St. John", "A", ("St. John", "St. Paul")) == 1.0
    citations = ("Doe, B. (2019)", "Roe, A. (2020)")
    assert accuracy("multiple choice", "B. Roe, A. (2020)", "B", citations) == 1.0, "its own content"
    assert accuracy("multiple choice", "red", "Q", COLOURS) == 0.0, "a reference beyond the options"
    assert accuracy("multiple choice", "Q", "Q", COLOURS) == 1.0


@pytest.mark.parametrize(
    "reference", ["A, C", "A,C", "AC", "A and C", "(A)(C)", "A; C", "A/C", "(A), (C)", "A & C", "A、C", "green, blue"]
)
@pytest.mark.parametrize(
    "answer, right",
    [
        *(
            (answer, 1)
            for answer in ("A, C", "AC", "C, A", "CA", "A and C", "C and A", "(A)(C)", "(C), (A)", "A;C", "a, c")
        ),
        *(
            (answer, 1)
            for answer in ("A C", "A. C.", "A\nC", "Answers: A, C", "The answer is A and C.", "both A and C")
        ),
        *((answer, 1) for answer in (r"\boxed{A, C}", "**A, C**", "A, A, C", "A. green\nC. blue", "green and blue")),
        *(
            (answer, 0)
            for answer in ("A", "C", "A, B", "A, B, C", "ABC", "A or C", "", "A, C, E", "B, D", "green", "AA")
        ),
        ("not A, C", 0),
    ],
)
def test_lists_of_letters_are_sets(reference, answer, right):
    assert accuracy("multiple choice", answer, reference, COLOURS) == right


def test_lists_without_known_options():
    for answer, right in (("C, A", 1), ("CA", 1), ("A", 0), ("A, B, C", 0), ("A and C", 1), ("A or C", 0)):
        assert accuracy("multiple choice", answer, "A, C") == right, answer
        assert accuracy("multiple choice", answer, "AC") == right, answer
    assert accuracy("multiple choice", "erd", "red") == 0.0, "a word is no list of letters"
    assert accuracy("multiple choice", "dab", "bad", ("w", "x", "y", "z")) == 0.0
    assert reference_options("red") is None and reference_options("BAD") is None
    assert chosen_options("A, " * 2000) is None and chosen_options("A " * 20000 + "x") is None


@pytest.mark.parametrize(
    "answer, reference, options, right",
    [
        ("1,000", "A", ("1000", "2000"), 1),
        ("1000", "A", ("1,000", "2000"), 1),
        ("5", "A", ("5 cm", "6 cm"), 1),
        ("5", "A", ("5 cm", "5 m"), 0),
        ("5 m", "A", ("5 cm", "6 cm"), 0),
        ("1.0", "B", ("1.00", "1.0"), 1),
        ("1.0", "A", ("1.00", "1.0"), 0),
        ("2", "C", ("1", "2", "3"), 0),
        ("2", "B", ("1", "2", "3"), 1),
        ("2", "2", ("1", "2", "3"), 1),
        ("B", "2", ("1", "2", "3"), 1),
        ("AC", "B", ("DC", "AC"), 1),
        ("red", "A", ("dark red", "red"), 0),
        ("red", "B", ("dark red", "red"), 1),
        ("None of the above.", "C", ("x", "y", "none of the above"), 1),
        ("No", "B", ("Yes", "No"), 1),
        ("A or B", "A or B", (), 1),
        ("Yes.", "yes", (), 1),
        ("B. red, C. blue", "B", (), 0),
        ("B. red and C. blue", "B", (), 0),
        ("B. red\nC. blue", "B", (), 0),
        ("B. J. K. Rowling", "B", (), 1),
        ("B. and so on", "B", (), 0),
    ],
)
def test_numbers_and_texts_of_options(answer, reference, options, right):
    assert accuracy("multiple choice", answer, reference, options) == right


def test_options_that_stand_in_the_question():
    question = "Which colour?\n(A) green\n(B) red\n(C) light blue\nAnswer with the option's letter from the choices."
    assert options_in_question(question) == ("green", "red", "light blue")
    assert options_in_question("Which?\nA. green\n B: red \n\nC) blue") == ("green", "red", "blue")
    for other in ("Which?\nA. green", "A. green\nC. red", "B. green\nC. red", "Which?", "A. x\nA. y", "A green\nB red"):
        assert options_in_question(other) == (), other


def test_letter_of_an_option():
    assert [option_letter(text, ["A. red", "blue"]) for text in ("red", "A. red", "b", "(B)", "c", "")] == [
        *("A", "A", "B", "B", None, None)
    ]


# --- mathematics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, reference, right",
    [
        (r"\frac{1}{2}", "1/2", 1),
        ("0.5", r"\frac12", 1),
        ("1/2", r"\dfrac{2}{4}", 1),
        (r"$\boxed{\frac{1}{2}}$", r"$\frac{1}{2}$", 1),
        ("1/3", r"\frac12", 0),
        (r"\sqrt{8}", r"2\sqrt{2}", 1),
        ("√8", r"2\sqrt{2}", 1),
        ("sqrt(8)", r"2\sqrt{2}", 1),
        (r"\sqrt{2}", r"\sqrt{3}", 0),
        ("2^{10}", "1024", 1),
        ("2**10", "1024", 1),
        ("x² + 1", "1 + x^2", 1),
        ("(x+1)^2", "x^2+2x+1", 1),
        ("(x+1)^2", "x^2+1", 0),
        ("[1, 2)", "[1,2)", 1),
        ("(1,2)", "[1,2]", 0),
        (r"(-\infty, 2]", r"\left(-\infty,2\right]", 1),
        ("(−∞, 1) ∪ (2, ∞)", r"(2,\infty)\cup(-\infty,1)", 1),
        ("(1,2)", "(2,1)", 0),
        ("1, 2", "2, 1", 1),
        (r"\{1, 2\}", r"\{2, 1\}", 1),
        ("x = 5", "5", 1),
        ("π/4", r"\frac{\pi}{4}", 1),
        ("3.14", r"\pi", 0),
        ("-2", "2", 0),
        (r"\pm 2", "2", 0),
        ("1,000", "1000", 1),
        ("3,14", "314", 0),
        ("1_5", "1", 0),
        ("1_5", "15", 0),
        ("5 cm", "5", 1),
        ("90°", "90", 1),
        ("Paris", "Pairs", 0),
        ("paris", "Paris", 1),
        ("", "5", 0),
        ("5" * 600, "5", 0),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", 1),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", 0),
        ("x > 3", "x>3", 1),
        (r"\frac{", "5", 0),
        *((answer, "5", 0) for answer in ("5x", "5π", r"5\pi", "5i", "5e", "5!", "5n", "5m", "5 million", "5 = 6")),
        *(
            (answer, "5", 1)
            for answer in ("5.", "$5", "€5", "5 °C", "5 m", "5 m/s", r"5\text{ cm}^2", "5 km²", "5 apples")
        ),
        *(
            (answer, "5/2", 1)
            for answer in ("2 1/2", "2½", r"2\frac12", "2.5", "10/4", r"$\frac{5}{2}$", "x = 5/2", "250%")
        ),
        *((answer, "3/2", 0) for answer in ("2 1/2", "2½")),
        ("-2 1/2", "-5/2", 1),
        ("12 - 1/2", "11.5", 1),
        ("½", "0.5", 1),
        ("0.5", "½", 1),
        ("5!", "120", 1),
        ("120", "5!", 1),
        ("3t", "3", 0),
        ("2ab", "2", 0),
        ("2x + 3t", "2x + 3", 0),
        (r"2\sqrt{3}\text{ cm}", r"2\sqrt{3}", 1),
        ("3 pi", r"3\pi", 1),
        ("2^-1", "0.5", 1),
        ("1.5 x 10^3", "1500", 1),
        ("1.5e3", "1500", 1),
        ("sin(x)", r"\sin x", 1),
        ("sin(x)", "nis(x)", 0),
        ("1 and 2", "2, 1", 1),
        ("x > 3", r"(3, \infty)", 1),
        ("3 < x < 5", "(3, 5)", 1),
        ("3 < x < 5", "[3, 5]", 0),
        (r"x \ge 3", "x > 3", 0),
        ("101_{2}", "101_2", 1),
        ("101", "101_2", 0),
        ("1.2.3", "0.36", 0),
        (r"\emptyset", "∅", 1),
        ("(1, 2)", "(1, 3)", 0),
        (r"\text{no solution}", "no solution", 1),
        ("x + 1.", "1 + x", 1),
        ("nan", "5", 0),
        ("--", "5", 0),
    ],
)
def test_mathematics(answer, reference, right):
    assert accuracy("math", answer, reference) == right
    assert accuracy("Math", answer, f"<answer>no</answer><answer>{reference}</answer>") == right


def test_a_reference_that_is_no_expression_is_counted():
    score = score_response("<answer>5</answer>", r"\frac{", "math", reward_parts(BY_TYPE))
    assert score.components["error"] == 1.0 and score.problems == (
        r"reward 'accuracy': ValueError: math-verify does not read the reference answer '\frac{'",
    )


def test_a_comparison_that_takes_too_long_is_wrong_and_counted(monkeypatch):
    """Its process is ended; one right reference of several is enough."""
    from megatron_ral.rewards import rules

    tower, parts = "9^{9^{9^{9}}}", reward_parts(BY_TYPE)
    response = f"<think>?</think><answer>{tower}</answer>"
    monkeypatch.setattr(rules, "MATH_SECONDS", 0.5)
    score = score_response(response, "7", "math", parts)
    assert score.components["accuracy"] == 0.0 and score.components["error"] == 1.0
    [problem] = score.problems
    assert problem in ("reward 'accuracy': did not return within 0.5 s", "reward 'accuracy': MemoryError: ")
    monkeypatch.setattr(rules, "MATH_WAIT", 0.0)
    assert accuracy_by_type(response, "1/7", "math") == 0.0
    with pytest.raises(rules.CallTimeout):
        mathematics("1/7", tower)
    score = score_response("<answer>1/7</answer>", tower, "math", parts)
    assert (score.components["accuracy"], score.components["error"]) == (0.0, 1.0)
    assert score.problems == ("reward 'accuracy': did not return within 0 s",)
    several = score_response("<answer>1/7</answer>", f"<answer>{tower}</answer><answer>1/7</answer>", "math", parts)
    assert (several.components["accuracy"], several.components["error"]) == (1.0, 0.0)
    monkeypatch.undo()
    assert accuracy("math", "2/14", "1/7") == 1.0
