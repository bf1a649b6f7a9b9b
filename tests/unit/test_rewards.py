"""Rewards on hand cases."""

import pytest

from megatron_ral.rewards.answer import accuracy_reward, extract_answer, format_reward
from megatron_ral.rewards.score import reward_components, score_response

GOOD = "<think>red</think><answer>7</answer>"


@pytest.mark.parametrize("response, accuracy, form", [
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
])
def test_response(response, accuracy, form):
    assert accuracy_reward(response, "<answer>7</answer>") == accuracy
    assert format_reward(response) == form


def test_without_thinking():
    assert format_reward("<answer>7</answer>", require_think=False) == 1.0
    assert format_reward(GOOD, require_think=False) == 0.0


def test_unparsed_is_counted_apart_and_carries_no_weight():
    weights = {"accuracy": 0.9, "format": 0.1}
    reward, parts = score_response("no tags", "<answer>7</answer>", reward_components(True), weights)
    assert (reward, parts["unparsed"]) == (0.0, 1.0)
    reward, parts = score_response(GOOD, "<answer>7</answer>", reward_components(True), weights)
    assert reward == pytest.approx(1.0) and parts["unparsed"] == 0.0
    assert extract_answer("<answer></answer>") == ""
