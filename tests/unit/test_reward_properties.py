"""Properties of every reward, on answers drawn at random with a fixed seed."""

import random
import string

import pytest

from megatron_ral.config.sections import RewardConfig
from megatron_ral.rewards.answer import accuracy_reward, extract_answer, format_reward
from megatron_ral.rewards.rules import RULES, accuracy_by_type
from megatron_ral.rewards.score import reward_parts, score_response

DRAWS = 250
SEVERAL = "consensus"
WORDS = ["red", "blue", "ball", "dog", "dogs", "seven", "near", "behind", "small", "tower", "24", "Exit"]
PRINTABLE = "".join(char for char in string.printable if char not in "<>") + "°½²٣红é−"


def answered(answer: str, thought: str = "?") -> str:
    return f"<think>{thought}</think><answer>{answer}</answer>"


def references(*answers: str) -> str:
    return "".join(f"<answer>{answer}</answer>" for answer in answers)


def text(rng: random.Random) -> str:
    """Return characters without tags, often a number, a letter, or words."""
    return rng.choice(
        [
            lambda: "".join(rng.choices(PRINTABLE, k=rng.randint(0, 20))),
            lambda: fitting("numerical", rng),
            lambda: fitting("multiple choice", rng),
            lambda: fitting("free form", rng),
            lambda: fitting("yes no", rng),
        ]
    )()


def fitting(problem_type: str, rng: random.Random) -> str:
    """Return an answer of the kind that the rule is for."""
    if problem_type in ("numerical", "regression", "relaxed accuracy", "chartqa"):
        return rng.choice(
            [str(rng.randint(-5000, 5000)), f"{rng.uniform(-99, 99):.2f}", f"{rng.randint(1000, 10**7):,}"]
        )
    if problem_type == "multiple choice":
        return rng.choice(string.ascii_uppercase[:8])
    if problem_type in ("yes no", "mme"):
        return rng.choice(["yes", "no", "Yes", "No"])
    return " ".join(rng.choices(WORDS, k=rng.randint(2, 8)))


@pytest.mark.parametrize("problem_type", [*RULES, SEVERAL])
def test_every_rule(problem_type):
    rng = random.Random(problem_type)
    for _ in range(DRAWS):
        fit, answer, other = fitting(problem_type, rng), text(rng), text(rng)
        assert accuracy_by_type(answered(fit), references(fit), problem_type) == pytest.approx(1.0), (
            "the reference itself"
        )
        reward = accuracy_by_type(answered(answer), references(fit), problem_type)
        assert 0.0 <= reward <= 1.0 and isinstance(reward, float)
        space, loud = rng.choice(["", " ", "\n", "\t "]), f"  {problem_type.upper().replace(' ', rng.choice(' -_/'))}"
        assert accuracy_by_type(answered(space + answer + space, other), references(fit), loud) == reward, (
            "neither space around the answer, nor what was thought, nor the spelling of the type has influence"
        )
        assert accuracy_by_type(answered(answer).replace("</answer>", ""), references(fit), problem_type) == 0.0
        shuffled = [fit, other, answer, fit]
        before = accuracy_by_type(answered(answer), references(*shuffled), problem_type)
        rng.shuffle(shuffled)
        assert accuracy_by_type(answered(answer), references(*shuffled), problem_type) == pytest.approx(before)
        if problem_type != SEVERAL:
            assert before >= max(reward, accuracy_by_type(answered(answer), references(other), problem_type))


def test_numerical_is_symmetric_and_knows_dress_from_value():
    rng = random.Random(1)
    for _ in range(DRAWS):
        value = round(rng.choice([rng.randint(-(10**6), 10**6), rng.uniform(-1000, 1000)]), 2)
        other = round(value + rng.choice([0, 0, 0.01, -0.02, 1]), 2)
        left, right = str(value), f"{other:,}" + rng.choice(["", " km", "%", " square metres", " m^2"])
        reward = accuracy_by_type(answered(right), left, "numerical")
        assert reward == accuracy_by_type(answered(left), right, "numerical") == float(value == other), (left, right)


@pytest.mark.parametrize("problem_type", ["regression", "relaxed accuracy"])
def test_relative_rules_know_neither_scale_nor_sign(problem_type):
    rng = random.Random(2)
    for _ in range(DRAWS):
        reference, error = rng.randint(1, 999), rng.choice([0.01, 0.04, 0.06, 0.5, 0.9, 1.5])
        rewards = [
            accuracy_by_type(answered(repr(scale * reference * (1 + side))), repr(scale * reference), problem_type)
            for scale in (1, -1, 1000, 0.125)
            for side in (error, -error)
        ]
        wanted = max(0.0, 1 - error) if problem_type == "regression" else float(error <= 0.05)
        assert rewards == pytest.approx([wanted] * 8, abs=1e-9), (reference, error)


def test_regression_falls_with_the_error():
    rng = random.Random(3)
    for _ in range(DRAWS):
        reference, (near, far) = rng.randint(1, 500), sorted(rng.uniform(0, 600) for _ in range(2))
        first, second = (
            accuracy_by_type(answered(f"{reference - error:.6f}"), str(reference), "regression")
            for error in (near, far)
        )
        assert first > second or first == second == 0.0 or near == far


def test_of_the_options_one_is_right():
    rng = random.Random(4)
    for _ in range(DRAWS):
        letter, dress = rng.choice("ABCDEF"), rng.choice(["{}", "({})", "{}.", "{}) it", "Answer: {}", r"\boxed{{{}}}"])
        rewards = [
            accuracy_by_type(answered(dress.format(option)), letter, "multiple choice") for option in "ABCDEFabcdef"
        ]
        assert sum(rewards) == 2 and rewards["ABCDEF".index(letter)] == rewards[6 + "ABCDEF".index(letter)] == 1.0


def test_of_yes_and_no_one_is_right():
    for said in ("yes", "no", "Yes.", "NO, never", "maybe", "", "yes?", "nobody", "I do not know"):
        total = sum(accuracy_by_type(answered(said), reference, "yes/no") for reference in ("yes", "no"))
        assert total == float(said in ("yes", "no", "Yes.", "NO, never", "yes?")), said


def test_a_wrong_word_costs_its_share_and_order_counts():
    rng = random.Random(5)
    for _ in range(DRAWS):
        words = rng.choices(WORDS, k=rng.randint(2, 9))
        place = rng.randrange(len(words))
        spoilt = words[:place] + ["@"] + words[place + 1 :]
        reward = accuracy_by_type(answered("  ".join(spoilt)), " ".join(words), "OCR")
        assert reward == pytest.approx(1 - 1 / len(words))
        missing = accuracy_by_type(answered(" ".join(words[:place] + words[place + 1 :])), " ".join(words), "OCR")
        assert missing == pytest.approx(1 - 1 / len(words))
        backwards = accuracy_by_type(answered(" ".join(reversed(words))), " ".join(words), "OCR")
        assert (backwards < 1) == (words != words[::-1])


def test_free_form_is_symmetric_and_a_foreign_word_lowers_it():
    rng = random.Random(6)
    for _ in range(DRAWS):
        left, right = (" ".join(rng.choices(WORDS, k=rng.randint(2, 8))) for _ in range(2))
        reward = accuracy_by_type(answered(left), right, "free-form")
        assert reward == pytest.approx(accuracy_by_type(answered(right), left, "free-form"))
        more = accuracy_by_type(answered(left + " unheard"), right, "free-form")
        assert more < reward or more == reward == 0.0


def test_consensus_by_the_number_of_people():
    rng = random.Random(7)
    for matches, reward in enumerate([0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]):
        answers = ["coke"] * matches + [f"no {index}" for index in range(10 - matches)]
        rng.shuffle(answers)
        assert accuracy_by_type(answered("Coke."), references(*answers), "vizwiz") == pytest.approx(reward)
    for count in range(1, 13):
        rewards = [
            accuracy_by_type(answered("x"), references(*["x"] * k, *["y"] * (count - k)), "vizwiz")
            for k in range(count + 1)
        ]
        assert rewards == sorted(rewards) and rewards[0] == 0.0 and rewards[-1] == pytest.approx(1.0)


def test_format_sees_tags_alone():
    rng, tags = random.Random(8), ("<think>", "</think>", "<answer>", "</answer>")
    for _ in range(DRAWS):
        response = (
            rng.choice(["", "\n"])
            + f"<think>{text(rng)}</think>"
            + rng.choice(["", " \n"])
            + (f"<answer>{text(rng)}</answer>")
            + rng.choice(["", "\n"])
        )
        assert format_reward(response) == 1.0 and format_reward(response, require_think=False) == 0.0
        place, tag = rng.randint(0, len(response)), rng.choice(tags)
        spoilt = rng.choice(
            [response[:place] + tag + response[place:], response.replace(tag, ""), "x" + response, response + "."]
        )
        assert format_reward(spoilt) == 0.0, spoilt


def test_exact_match_is_equality_of_stripped_text():
    rng = random.Random(9)
    for _ in range(DRAWS):
        left, right = text(rng), text(rng)
        assert accuracy_reward(answered(f" {left}\n"), references(left), "numerical") == 1.0
        assert accuracy_reward(answered(left), right) == float(left.strip() == right.strip())
        assert extract_answer(answered(left)) == left.strip()


def test_reward_is_the_weighted_sum_of_its_parts():
    rng = random.Random(10)
    for _ in range(DRAWS):
        weights = {"accuracy_weight": rng.uniform(0, 2), "format_weight": rng.uniform(0, 2)}
        settings = RewardConfig(accuracy=rng.choice(["exact", "by_type"]), require_think=rng.random() < 0.5, **weights)
        response = rng.choice([answered, references, str])(fitting("numerical", rng))
        score = score_response(response, fitting("numerical", rng), "regression", reward_parts(settings))
        wanted = sum(weights[f"{name}_weight"] * score.components[name] for name in ("accuracy", "format"))
        assert score.reward == pytest.approx(wanted)
        assert score.components["unparsed"] == float("<answer>" not in response) == float(bool(score.problems))
