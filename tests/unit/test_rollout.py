"""From scored groups to training batches without a model: advantages, which groups take part, denominators."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from megatron_ral.config import RunConfig
from megatron_ral.config.sections import LossConfig, RolloutConfig
from megatron_ral.engine.protocol import ForwardOutput, TokenOutputs
from megatron_ral.rollout import collect
from megatron_ral.rollout.assemble import assemble_minibatches, global_totals
from megatron_ral.rollout.collect import ScoredGroups
from megatron_ral.types import GroupBatch, Prompt, ResponseBatch, Score, StepTotals, pad_prompts

G, R = 2, 4
REWARDS = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.1, 1.0]]
LENGTHS = [[4, 1], [3, 3], [2, 4], [1, 2]]
ALONE = SimpleNamespace(data=SimpleNamespace(size=lambda: 1), device=torch.device("cpu"))


def prompt():
    none = torch.zeros(3, dtype=torch.bool)
    return Prompt(None, torch.zeros(3, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.int64), 3, torch.zeros(0, 4),
                  torch.zeros(0, 3), none, none, torch.zeros(0, dtype=torch.int64))


def config(num_minibatches=1, **loss):
    return RunConfig(rollout=RolloutConfig(num_prompts=4, group_size=G, num_minibatches=num_minibatches,
                                           max_response_length=9), loss=LossConfig(**loss))


def responses(indices):
    lengths = torch.tensor([LENGTHS[index] for index in indices])
    shape = (len(indices), G, R)
    return ResponseBatch(pad_prompts([prompt() for _ in indices], 0), torch.zeros(shape, dtype=torch.int64), lengths,
                         torch.zeros(shape), torch.ones(shape[:2], dtype=torch.bool))


def rollout():
    """Four groups in two micro-batches."""
    result = []
    for indices in ([0, 1], [2, 3]):
        batch = responses(indices)
        rewards = torch.tensor([REWARDS[index] for index in indices])
        result.append(ScoredGroups(GroupBatch(batch.prompts, batch.response_ids, batch.response_lengths),
                                   Score(rewards, {}, ()), rewards, batch.rollout_logprobs, batch.finished))
    return result


def passes():
    return [ForwardOutput(TokenOutputs(torch.zeros(2, G, R), torch.zeros(2, G, R)), {}) for _ in range(2)]


def test_all_groups_take_part_by_default():
    [batches] = assemble_minibatches(rollout(), passes(), None, config(), ALONE)
    assert {batch.totals for batch in batches} == {StepTotals(20, 8, 9)}
    assert all(torch.equal(batch.loss_mask, batch.groups.response_mask) for batch in batches)


def test_groups_with_equal_rewards_leave_masks_and_totals():
    [batches] = assemble_minibatches(rollout(), passes(), None, config(filter_equal_rewards=True), ALONE)
    assert {batch.totals for batch in batches} == {StepTotals(4 + 1 + 1 + 2, 4, 9)}
    counted = [batch.loss_mask.sum((1, 2)).tolist() for batch in batches]
    assert counted == [[5, 0], [0, 3]]


def test_each_optimizer_step_has_its_own_totals():
    minibatches = assemble_minibatches(rollout(), passes(), None, config(2, filter_equal_rewards=True), ALONE)
    assert [step[0].totals for step in minibatches] == [StepTotals(5, 2, 9), StepTotals(3, 2, 9)]


def test_a_step_without_any_signal_divides_by_one():
    lengths = responses([1, 2]).response_lengths
    assert global_totals([lengths], 9, ALONE) == StepTotals(12, 4, 9)
    assert global_totals([lengths[torch.tensor([False, False])]], 9, ALONE) == StepTotals(1, 1, 9)


@pytest.mark.parametrize("scale, wanted", [("none", [[0.5, -0.5], [0, 0]]), ("std", [[0.7071, -0.7071], [0, 0]])])
def test_scale_of_advantages_reaches_the_rollout(monkeypatch, scale, wanted):
    batch = responses([0, 1])
    score = Score(torch.tensor(REWARDS[:2]), {"accuracy": torch.zeros(2, G)}, (("a", "b"), ("c", "d")))
    monkeypatch.setattr(collect, "sample_responses", lambda *arguments: iter([(batch, None)]))
    monkeypatch.setattr(collect, "score_responses", lambda *arguments: score)
    engine, processor = SimpleNamespace(resident=nullcontext), SimpleNamespace(end_token_id=1, pad_token_id=0)
    [scored] = collect.collect_rollout(engine, batch.prompts.prompts, processor, config(advantage_scale=scale), 0, 2)
    assert torch.allclose(scored.advantages, torch.tensor(wanted).float(), atol=1e-4)
