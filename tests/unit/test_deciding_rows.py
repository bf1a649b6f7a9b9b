"""Deciding rows: the place of an answer in a response, its token, and attention at the row that predicts it."""

from dataclasses import replace

import pytest
import torch

from megatron_ral.attention.deciding import deciding_rows, row_sums
from megatron_ral.attention.group_layout import AttentionRecord, GroupLayout
from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.attention.mass import RowMass, row_masses
from megatron_ral.attention.types import QueryPosition
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.evaluation.evaluate import _attention_sums
from megatron_ral.rewards.answer_place import answer_start
from megatron_ral.rollout.scoring import answer_tokens
from megatron_ral.types import GroupBatch, PromptBatch, ResponseBatch


@pytest.mark.parametrize(
    "response, before",
    [
        ("<think>blue9</think><answer>9</answer>", "<think>blue"),
        ("<think>19 or 9.5, no: 9.</think><answer>9</answer>", "<think>19 or 9.5, no: "),
        ("<think>1,9 is not it</think><answer>9</answer>", "<think>1,9 is not it</think><answer>"),
        ("<think>a hundred red cars</think><answer>red</answer>", "<think>a hundred "),
        ("<think>it is $7$</think><answer>\\boxed{7}</answer>", "<think>it is $"),
        ("<think>A car is here</think><answer>A</answer>", "<think>A car is here</think><answer>"),
        ("<think>(B) fits</think><answer>(B)</answer>", "<think>(B) fits</think><answer>"),
        ("<think>two of them</think><answer> 2 </answer>", "<think>two of them</think><answer> "),
        ("<answer>the red car</answer>", "<answer>"),
        ("the red car <answer>the red car</answer>", ""),
        ("<answer>5</answer> so 5", "<answer>"),
    ],
)
def test_answer_begins_where_it_first_stands_alone(response, before):
    assert answer_start(response) == len(before)


@pytest.mark.parametrize("response", ["", "no tags 9", "<answer></answer>", "<answer>1</answer><answer>2</answer>"])
def test_response_without_an_answer_has_no_place(response):
    assert answer_start(response) is None


@pytest.fixture(scope="module")
def processor(material):
    return PromptProcessor(str(material["tiny"]), 256)


def responses_of(texts, processor) -> ResponseBatch:
    """Return a batch of one prompt with these responses, as a model would have written them."""
    rows = [torch.tensor([*processor.tokenizer(text)["input_ids"], processor.end_token_id]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=processor.pad_token_id)[None]
    lengths = torch.tensor([[len(row) for row in rows]])
    return ResponseBatch(None, ids, lengths, torch.zeros(ids.shape), torch.ones(1, len(rows), dtype=torch.bool))


def test_token_is_the_one_that_the_answer_begins_with(processor):
    texts = [
        "<think>blue9</think><answer>9</answer>",
        "<think>red</think><answer>7</answer>",
        "<think>é…ü green4</think><answer>4</answer>",  # characters of several tokens before the answer
        "no answer",
    ]
    responses = responses_of(texts, processor)
    [found] = answer_tokens(responses, [texts], processor).tolist()
    assert found[-1] == -1
    for text, ids, token in zip(texts[:3], responses.response_ids[0], found):
        assert len(processor.decode(ids[:token])) <= answer_start(text) < len(processor.decode(ids[: token + 1]))
    assert [processor.decode(ids[token : token + 1]) for ids, token in zip(responses.response_ids[0], found[:3])] == [
        "9",
        "7",
        "4",
    ]


def hand_made():
    """One prompt of 6 tokens, 1 to 4 visual and 2 the target; two responses of 4 and 3 tokens."""
    visual, target = torch.zeros(1, 6, dtype=torch.bool), torch.zeros(1, 6, dtype=torch.bool)
    visual[0, 1:5], target[0, 2] = True, True
    prompts = PromptBatch((), torch.zeros(1, 6).long(), torch.tensor([6]), None, None, visual, target)
    lengths, answers = torch.tensor([[4, 3]]), torch.tensor([[2, -1]])
    groups = GroupBatch(prompts, torch.zeros(1, 2, 4).long(), lengths, None, answers)
    attention = torch.zeros(1, 2, 4, 10)
    attention[..., 0], attention[..., 1:5] = 0.6, 0.1  # the target has a quarter of the attention to the picture
    attention[0, 0, 1, 1:5] = torch.tensor([0.05, 0.30, 0.05, 0.0])  # deciding row of response 0: 3/4
    attention[0, 1, 2, 1:5] = torch.tensor([0.0, 0.2, 0.2, 0.0])  # peak of response 1: 1/2
    attention[0, 1, 3, 1:5] = torch.tensor([0.0, 0.4, 0.0, 0.0])  # behind its end
    return groups, attention


def given_rows(attention, layout) -> AttentionRows:
    """Return rows whose attention is given instead of formed."""
    rows = AttentionRows(AttentionRecord(*[torch.empty(0)] * 4), layout, QueryPosition.RESPONSE, None)
    vars(rows)["attention"] = attention
    return rows


def test_deciding_row_is_the_one_before_the_answer():
    groups, _ = hand_made()
    before, predicting = (
        deciding_rows(groups, position) for position in (QueryPosition.RESPONSE, QueryPosition.PREDICTING)
    )
    assert before.nonzero().tolist() == [[0, 0, 1]] and predicting.nonzero().tolist() == [[0, 0, 2]]


def test_numbers_of_a_hand_made_pattern():
    groups, attention = hand_made()
    layout = GroupLayout.of(groups)
    rows = given_rows(attention, layout)
    sums = {name: float(value) for name, value in _attention_sums(rows, groups).items()}
    assert sums["target_deciding_count"] == 1 and sums["target_deciding"] == pytest.approx(0.75)
    assert sums["target_peak_count"] == 2 and sums["target_peak"] == pytest.approx(0.75 + 0.5)
    assert sums["target_mass_count"] == 7 and sums["target_mass"] == pytest.approx(5 * 0.25 + 0.75 + 0.5)


def test_prompts_without_annotation_and_unknown_answers_do_not_count():
    groups, attention = hand_made()
    keys, prompts = given_rows(attention, GroupLayout.of(groups)).keys(), groups.prompts
    share = RowMass(*row_masses(attention, keys, prompts.visual_mask, prompts.target_mask)).target_share
    unknown = row_sums(share[None], replace(groups, answer_tokens=None), groups.response_mask)[2]
    assert unknown.deciding[1] == 0 and unknown.all_rows[1] == 7
    bare = replace(groups, prompts=replace(groups.prompts, target_mask=torch.zeros(1, 6, dtype=torch.bool)))
    assert [int(count) for _, count in row_sums(share[None], bare, bare.response_mask)[2].named().values()] == [0, 0, 0]
