"""Rewards against the published rules, written anew here from their definitions, on answers drawn at random.

Where ours depart (the docstrings of `rewards/rules.py` say how), the test says which answers may differ and decides
them by what the answer was made from. Every test counts that both outcomes were there.
"""

import random
import re
from collections import Counter

import pytest

from megatron_ral.rewards.answer import format_reward
from megatron_ral.rewards.rules import accuracy_by_type

DRAWS = 600
WORDS = [
    "the",
    "a",
    "red",
    "ball",
    "runs",
    "running",
    "dog",
    "dogs",
    "quickly",
    "quick",
    "sign",
    "Exit",
    "EXIT",
    "shop",
    "Shop's",
    "24",
    "7th",
    "in",
    "of",
]


def ours(answer: str, solution: str, problem_type: str) -> float:
    return accuracy_by_type(f"<think>?</think><answer>{answer}</answer>", f"<answer>{solution}</answer>", problem_type)


def as_float(text: str):
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


CHOICE_DRESS = [
    "{}",
    "{}",
    "{}",
    " {} ",
    "({})",
    "{}.",
    "{})",
    "[{}]",
    "{}: a red ball",
    "({}) two dogs",
    "{}. running",
    "Option {}",
    r"\boxed{{{}}}",
    "**{}**",
    "The answer is {}.",
]
NO_CHOICE = ["", "{0} or {1}", "{0}, {1}", "({0})({1})", "{0}{1}", "{0} red balls", "neither", "7", "{0}/{1}"]


def test_multiple_choice():
    rng, seen = random.Random(1), Counter()
    for _ in range(DRAWS):
        letter, other = rng.sample("ABCDE", 2)
        picked = rng.choice([letter, letter, other])
        case = rng.choice([str.upper, str.upper, str.lower])
        plain_answer = rng.random() < 0.8
        template = rng.choice(CHOICE_DRESS if plain_answer else NO_CHOICE)
        answer = template.format(case(picked), other if picked == letter else letter)
        solution = rng.choice(["{}", "({})", "{}. a red ball", " {}"]).format(letter)
        reward = ours(answer, solution, "multiple choice")
        assert reward == float(plain_answer and picked == letter), (answer, solution)
        published = float(answer.strip() == solution.strip())
        assert reward >= published
        seen[reward, published] += 1
    assert min(seen[1.0, 1.0], seen[1.0, 0.0], seen[0.0, 0.0]) > 15, seen


ARABIC, WIDE = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩"), str.maketrans("0123456789.-", "０１２３４５６７８９．－")
NUMBER_DRESS = [
    str,
    str,
    str,
    lambda text: f" {text}\n",
    lambda text: text + ".",
    lambda text: text + " cm",
    lambda text: text + "%",
    lambda text: "$" + text if text[0] != "-" else text + " $",
    lambda text: rf"\boxed{{{text}}}",
    lambda text: rf"${text}\text{{ km/h}}$",
    lambda text: text.translate(ARABIC),
    lambda text: text.translate(WIDE),
    lambda text: text.replace("-", "−"),
]
NO_NUMBER = [
    "",
    "many",
    "1/2",
    "3-4",
    "10:30",
    "3 of 4",
    "1 2",
    "nan",
    "inf",
    "about 5",
    "five",
    "5 million",
    "2½",
    "10²",
    "5 and a half",
]


def drawn_number(rng: random.Random, value: float | None = None) -> tuple[str, float | None]:
    """Return (text, value or None), at times close to a given value."""
    if value is None and rng.random() < 0.1:
        return rng.choice(NO_NUMBER), None
    if value is None:
        value = rng.choice([rng.randint(-20, 20), rng.randint(1000, 2_000_000), round(rng.uniform(-50, 50), 3)])
    value = round(value + rng.choice([0, 0, 0, 0, 0.001, 0.004, 0.02, 1, -1, value]), 4)
    digits = f"{value:,}" if rng.random() < 0.3 else str(value)
    if rng.random() < 0.5:
        digits = digits.removesuffix(".0")
    return rng.choice(NUMBER_DRESS)(digits), value


def pair_of_numbers(rng: random.Random):
    solution, wanted = drawn_number(rng)
    answer, value = drawn_number(rng, wanted) if wanted is not None and rng.random() < 0.8 else drawn_number(rng)
    return answer, value, solution, wanted


def published_numerical(answer: str, solution: str) -> float:
    def has_mark(text):
        return "." in text or "," in text

    left, right = as_float(answer), as_float(solution)
    if has_mark(answer) != has_mark(solution) or left is None or right is None:
        return 0.0
    return float(round(left, 2) == round(right, 2))


def test_numerical():
    rng, seen = random.Random(2), Counter()
    for _ in range(3 * DRAWS):
        answer, value, solution, wanted = pair_of_numbers(rng)
        reward = ours(answer, solution, "numerical")
        published = published_numerical(answer.strip(), solution.strip())
        is_small = wanted is not None and abs(wanted) < 0.01
        if wanted is None or value is None:
            same = wanted is None and answer == solution
        elif is_small:
            same = abs(value - wanted) <= 0.01 * max(abs(value), abs(wanted))
        else:
            same = round(value, 2) == round(wanted, 2)
        assert reward == float(same), (answer, solution)
        if not is_small and not (wanted is None and solution in ("nan", "inf")):
            assert reward >= published, (answer, solution)
        seen[reward, published] += 1
    assert min(seen[1.0, 1.0], seen[1.0, 0.0], seen[0.0, 0.0]) > 100, seen


def test_regression():
    rng, compared = random.Random(3), Counter()
    for _ in range(3 * DRAWS):
        answer, value, solution, wanted = pair_of_numbers(rng)
        reward = ours(answer, solution, "regression")
        left, right = as_float(answer.strip()), as_float(solution.strip())
        if wanted is None or solution in NO_NUMBER:
            assert reward == float(answer == solution)
        elif left is not None and value is not None and right is not None and abs(right) > 1e-3:
            published = 1 - min(1.0, (abs(left - right) + 1e-9) / (abs(right) + 1e-9))
            assert reward == pytest.approx(published, abs=2e-6), (answer, solution)
            compared[reward > 0.999, reward == 0] += 1
        elif value is not None and wanted:
            assert reward == pytest.approx(max(0.0, 1 - abs(value - wanted) / abs(wanted))), (answer, solution)
        else:
            assert reward == float(value == wanted), (answer, solution)
    assert len(compared) == 3 and min(compared.values()) > 40, compared


def published_relaxed(answer: str, solution: str) -> float:
    def value(text):
        try:
            return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None

    left, right = value(answer), value(solution)
    if left is not None and right:
        return float(abs(left - right) / abs(right) <= 0.05)
    return float(answer.lower() == solution.lower())


def test_relaxed_accuracy():
    rng, seen = random.Random(4), Counter()
    names = ["China", "china", "Q1", "25 years", "26 years", "2010-2012", "yes"]
    for _ in range(3 * DRAWS):
        right = rng.choice([rng.randint(1, 3000), round(rng.uniform(-90, 90), 2), 100])
        left = right * rng.choice([1, 1.05, 1.02, 0.951, 1.06, 0.94, -1, 100, 0.01, 0])
        solution, answer = (f"{number:.6g}" + rng.choice(["", "", "%"]) for number in (right, left))
        if rng.random() < 0.2:
            solution = rng.choice(names)
        if rng.random() < 0.2:
            answer = rng.choice(names)
        reward, published = ours(answer, solution, "chartqa"), published_relaxed(answer, solution)
        if as_float(solution.rstrip("%")) != 0:
            assert reward == published, (answer, solution)
        seen[reward] += 1
        # commas: as if they were not there
        if as_float(answer.rstrip("%")) is not None:
            with_commas = re.sub(r"^(-?\d)(\d{3})\b", r"\1,\2", answer)
            assert ours(with_commas, solution, "relaxed accuracy") == reward
    assert min(seen.values()) > 300 and set(seen) == {0.0, 1.0}, seen


def drawn_text(rng: random.Random, around: str | None = None) -> str:
    words = rng.choices(WORDS, k=rng.randint(0, 9)) if around is None else around.split()
    for _ in range(rng.randint(0, 3)):
        place = rng.randint(0, len(words))
        words[place : place + rng.randint(0, 2)] = rng.choices(WORDS, k=rng.randint(0, 2))
    return "".join(word + rng.choice([" ", " ", "  ", "\n", ", ", ". "]) for word in words)


def edit_distance(left: list, right: list) -> int:
    """Return the Levenshtein distance over words by its recurrence, row by row."""
    row = list(range(len(right) + 1))
    for i, word in enumerate(left, 1):
        before, row = row, [i]
        for j, other in enumerate(right, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (word != other)))
    return row[-1]


def test_transcription():
    rng, seen = random.Random(5), []
    for _ in range(DRAWS):
        solution = drawn_text(rng)
        answer = drawn_text(rng, solution if rng.random() < 0.8 else None)
        words = solution.split()
        published = max(0.0, 1 - edit_distance(words, answer.split()) / max(1, len(words)))
        seen.append(ours(answer, solution, "OCR"))
        assert seen[-1] == pytest.approx(published, abs=1e-12), (answer, solution)
    assert seen.count(0.0) > 20 and seen.count(1.0) > 20 and len(set(seen)) > 20


def published_rouge(answer: str, solution: str) -> float:
    """Return the mean F measure of ROUGE-1, -2 and -L over lower-case runs of a-z0-9, stemmed if longer than three."""
    from nltk.stem.porter import PorterStemmer

    stem = PorterStemmer().stem
    left, right = (
        [stem(word) if len(word) > 3 else word for word in re.findall("[a-z0-9]+", text.lower())]
        for text in (answer, solution)
    )

    def f(hits, of_left, of_right):
        return 2 * hits / (of_left + of_right) if hits else 0.0

    def grams(words, n):
        return Counter(zip(*(words[start:] for start in range(n))))

    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, word in enumerate(left):
        for j, other in enumerate(right):
            table[i + 1][j + 1] = table[i][j] + 1 if word == other else max(table[i][j + 1], table[i + 1][j])
    scores = [f(table[-1][-1], len(left), len(right))]
    for n in (1, 2):
        a, b = grams(left, n), grams(right, n)
        scores.append(f((a & b).total(), a.total(), b.total()))
    return sum(scores) / 3


def test_free_form():
    rng, seen = random.Random(6), []
    for _ in range(DRAWS):
        solution = drawn_text(rng)
        answer = drawn_text(rng, solution if rng.random() < 0.8 else None)
        seen.append(ours(answer, solution, "free-form"))
        assert seen[-1] == pytest.approx(published_rouge(answer, solution), abs=1e-9), (answer, solution)
    assert seen.count(0.0) > 20 and seen.count(1.0) > 20 and len(set(seen)) > 50


def test_yes_or_no():
    """The rule equals the published one except for words that only begin like yes and no."""
    rng, seen = random.Random(7), Counter()
    for _ in range(DRAWS):
        said = rng.choice(["yes", "no"] * 3 + ["maybe", "unclear", "I think so", "", "not sure", "none", "yesterday"])
        dress = rng.choice(["{}", "{}.", " {}", "{}, it is there", "({})", "'{}'"])
        answer = dress.format(rng.choice([said, said.upper()]))
        solution = rng.choice(["yes", "no", "Yes", "No"])
        start = answer.strip().lower()[:4]
        published = "yes" if "yes" in start else "no" if "no" in start else "other"
        reward = ours(answer, solution, "yes/no")
        if said not in ("not sure", "none", "yesterday"):
            assert reward == float(published == solution.lower()), (answer, solution)
        assert reward == float(said == solution.lower()), (answer, solution)
        seen[reward] += 1
    assert min(seen.values()) > 100


def published_vqa(answer: str, references: list[str]) -> float:
    """Return the mean over sets of nine of min(matches / 3, 1), with answers normalised like in the VQA tools."""
    digits = {"none": "0", "zero": "0", "one": "1", "two": "2", "ten": "10"}

    def alike(given):
        text = given
        for mark in ';/[]"{}()=+\\_-><@`,?!':
            glued = f"{mark} " in given or f" {mark}" in given or re.search(r"\d,\d", given)
            text = text.replace(mark, "" if glued else " ")
        words = re.sub(r"\.(?!\d)", "", text).lower().split()
        words = [digits.get(word, word) for word in words if word not in ("a", "an", "the")]
        return " ".join("don't" if word == "dont" else word for word in words)

    if len(set(references)) > 1:
        answer, references = alike(answer), [alike(reference) for reference in references]
    left_out = [min(1, sum(other == answer for j, other in enumerate(references) if j != i) / 3) for i in range(10)]
    return sum(left_out) / 10


def test_consensus():
    rng, seen = random.Random(8), Counter()
    things = ["dog", "red dog", "two dogs", "don't know", "1,000", "u.s.", "2.5", "unanswerable", "none"]
    dress = ["{}", "a {}", "the {}", "{}.", "{}!", "{} ", "{}?"]
    for _ in range(DRAWS):
        chosen = rng.sample(things, rng.randint(2, 6))
        answers = [rng.choice(dress).format(rng.choice(chosen)) for _ in range(10)]
        answer = rng.choice(dress).format(rng.choice(things)).replace("don't", rng.choice(["dont", "don't"])).upper()
        reward = accuracy_by_type(
            f"<answer>{answer}</answer>", "".join(f"<answer>{text}</answer>" for text in answers), "vizwiz"
        )
        assert reward == pytest.approx(published_vqa(answer.lower(), answers)), (answer, answers)
        seen[round(10 * reward)] += 1
    assert set(seen) == {0, 3, 6, 9, 10} and min(seen.values()) > 30, seen


TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


def test_format():
    """The format equals the published one if each tag stands once and no space surrounds the whole."""
    rng, seen = random.Random(9), Counter()
    for _ in range(2 * DRAWS):
        pieces = ["<think>", "red", "</think>", rng.choice(["", "\n", " x"]), "<answer>", "7", "</answer>"]
        for _ in range(rng.randint(0, 2)):
            place = rng.randrange(len(pieces))
            pieces[place : place + rng.randint(0, 2)] = [rng.choice([*TAGS, "\n"])]
        text = "".join(pieces)
        once = all(text.count(tag) <= 1 for tag in TAGS)
        for require_think, pattern in (
            (True, r"<think>.*?</think>\s*<answer>.*?</answer>"),
            (False, r"<answer>.*?</answer>"),
        ):
            published = re.fullmatch(pattern, text.strip(), re.DOTALL) is not None
            allowed = once and (require_think or "think>" not in text)
            assert format_reward(text, require_think) == float(published and allowed), text
            bare = "<answer>7</answer>" + rng.choice(["", " ", "."])
            assert format_reward(bare, require_think) == float(not require_think and bare[-1] != ".")
        seen[published, format_reward(text)] += 1
        seen[format_reward(text)] += 1
    assert min(seen[0.0], seen[1.0]) > 200
