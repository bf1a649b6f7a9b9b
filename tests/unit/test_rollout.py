"""From scored groups to training batches without a model: advantages and their shuffled control, which groups take
part, denominators, and targets made of successful responses."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_ral.attention.targets.hindsight import mean_prompt_row, success_row
from megatron_ral.config import RunConfig
from megatron_ral.config.loss import LossConfig
from megatron_ral.config.sections import RolloutConfig
from megatron_ral.engine.outputs import ForwardOutput
from megatron_ral.functional.advantages import group_advantages
from megatron_ral.objectives.attention import AttentionTerm
from megatron_ral.objectives.base import TokenOutputs
from megatron_ral.rollout import collect
from megatron_ral.rollout.assemble import assemble_minibatches, global_totals, num_on_policy_updates
from megatron_ral.rollout.collect import RolloutBatch, shuffled_order
from megatron_ral.rollout.lengths import (
    MicroBatchSettings,
    cut_into_micro_batches,
    longest_first,
    split_further,
    spread,
)
from megatron_ral.rollout.sampler import SampledBatch
from megatron_ral.rollout.settings import RolloutSettings
from megatron_ral.types import GroupBatch, Prompt, ResponseBatch, Sample, Score, StepTotals, pad_prompts

G, R = 2, 4
REWARDS = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.1, 1.0]]
LENGTHS = [[4, 1], [3, 3], [2, 4], [1, 2]]
ENGINE = SimpleNamespace(
    resident=nullcontext,
    shape=SimpleNamespace(num_layers=2, softmax_layers=(0, 1), layer_indices=lambda layers, key="": list(layers)),
    process_groups=SimpleNamespace(data=SimpleNamespace(size=lambda: 1), device=torch.device("cpu")),
)
PROCESSOR = SimpleNamespace(end_token_id=1, pad_token_id=0, decode=lambda ids: "")
ALONE = ENGINE.process_groups


def prompt(key="a"):
    none, tokens = torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
    return Prompt(
        sample=Sample(key, "shard", "", "", "", "", (), ()),
        input_ids=tokens,
        position_ids=tokens.expand(3, 3),
        next_position=3,
        patches=(),
        grid_thw=torch.zeros(0, 3, dtype=torch.int64),
        is_video=torch.zeros(0, dtype=torch.bool),
        seconds_per_grid=torch.zeros(0),
        visual_mask=none,
        target_mask=none,
        response_ids=tokens[:0],
    )


def config(num_minibatches=1, **loss):
    return RunConfig(
        rollout=RolloutConfig(num_prompts=4, group_size=G, num_minibatches=num_minibatches, max_response_length=9),
        loss=LossConfig(**loss),
    )


def responses(indices):
    lengths = torch.tensor([LENGTHS[index] for index in indices])
    shape = (len(indices), G, R)
    return ResponseBatch(
        pad_prompts([prompt(f"prompt {index}") for index in indices], 0),
        torch.zeros(shape, dtype=torch.int64),
        lengths,
        torch.zeros(shape),
        torch.ones(shape[:2], dtype=torch.bool),
    )


def rollout():
    """Four groups in two micro-batches."""
    result = []
    for indices in ([0, 1], [2, 3]):
        batch = responses(indices)
        rewards = torch.tensor([REWARDS[index] for index in indices])
        result.append(
            RolloutBatch(
                GroupBatch(batch.prompts, batch.response_ids, batch.response_lengths),
                Score(rewards, {}, ()),
                rewards,
                rewards.flip(1),
                batch.rollout_logprobs,
                batch.finished,
                torch.zeros(2, dtype=torch.bool),
            )
        )
    return result


def passes(attention=({}, {})):
    return [ForwardOutput(TokenOutputs(torch.zeros(2, G, R), torch.zeros(2, G, R)), rows) for rows in attention]


def assembled(rollout, old, reference, target, config):
    return assemble_minibatches(
        rollout,
        old,
        reference,
        target,
        AttentionTerm(config.loss, frozenset({3}), 1.0),
        num_minibatches=config.rollout.num_minibatches,
        max_response_length=config.rollout.max_response_length,
        process_groups=ALONE,
    )


def test_all_groups_take_part_by_default():
    [batches] = assembled(rollout(), passes(), None, passes(), config())
    assert {batch.totals for batch in batches} == {StepTotals(20, 8, 9)}
    assert all(torch.equal(batch.loss_mask, batch.groups.response_mask) for batch in batches)


def test_groups_with_equal_rewards_leave_masks_and_totals():
    [batches] = assembled(rollout(), passes(), None, passes(), config(filter_equal_rewards=True))
    assert {batch.totals for batch in batches} == {StepTotals(4 + 1 + 1 + 2, 4, 9)}
    counted = [batch.loss_mask.sum((1, 2)).tolist() for batch in batches]
    assert counted == [[5, 0], [0, 3]]


def test_each_optimizer_step_has_its_own_totals():
    minibatches = assembled(rollout(), passes(), None, passes(), config(2, filter_equal_rewards=True))
    assert [step[0].totals for step in minibatches] == [StepTotals(5, 2, 9), StepTotals(3, 2, 9)]


def test_the_first_update_needs_no_pass_before_it():
    """Micro-batches without one are marked; those of another epoch never are."""
    first, second = assembled(rollout(), [None, passes()[1]], passes(), [None, passes(({}, {3: "rows"}))[1]], config(2))
    assert [batch.is_on_policy for batch in (*first, *second)] == [True, False]
    assert first[0].old_logprobs is None and first[0].target_attention == {} and first[0].ref_logprobs is not None
    assert second[0].old_logprobs is not None and second[0].target_attention == {3: "rows"}
    assert num_on_policy_updates(num_epochs=1) == 1 and num_on_policy_updates(num_epochs=2) == 0


def test_a_step_without_any_signal_divides_by_one():
    lengths = responses([1, 2]).response_lengths
    assert global_totals([lengths], 9, ALONE) == StepTotals(12, 4, 9)
    assert global_totals([lengths[torch.tensor([False, False])]], 9, ALONE) == StepTotals(1, 1, 9)


def collected(monkeypatch, indices, micro_batch_size, group_size=G, step=0, seed=0, rewards=None, **loss):
    """What `collect_rollout` makes of responses and rewards that are given."""
    width = (len(indices), group_size)
    batch = ResponseBatch(
        pad_prompts([prompt(f"prompt {index}") for index in indices], 0),
        torch.zeros(*width, R, dtype=torch.int64),
        torch.full(width, R),
        torch.zeros(*width, R),
        torch.ones(width, dtype=torch.bool),
    )
    rewards = torch.tensor([REWARDS[index] for index in indices]) if rewards is None else rewards
    score = Score(
        rewards,
        {"accuracy": torch.zeros(width)},
        (("",) * group_size,) * len(indices),
        tuple(((f"unparsed: {index}",),) * group_size for index in indices),
    )
    monkeypatch.setattr(collect, "score_responses", lambda *arguments: score)
    engine, processor = ENGINE, PROCESSOR
    sampler = SimpleNamespace(sample=lambda *arguments: iter([SampledBatch(batch, None, (0,) * len(indices))]))
    settings = RolloutSettings.from_config(replace(config(**loss), seed=seed))
    rollout = collect.collect_rollout(
        engine, sampler, batch.prompts.prompts, processor, settings, step, MicroBatchSettings(micro_batch_size)
    )
    return rollout.batches


@pytest.mark.parametrize("scale, wanted", [("none", [[0.5, -0.5], [0, 0]]), ("std", [[0.7071, -0.7071], [0, 0]])])
def test_scale_of_advantages_reaches_the_rollout(monkeypatch, scale, wanted):
    [scored] = collected(monkeypatch, [0, 1], 2, advantage_scale=scale)
    assert torch.allclose(scored.advantages, torch.tensor(wanted).float(), atol=1e-4)
    assert torch.equal(scored.attention_advantages, scored.advantages)
    assert scored.groups.answer_tokens.tolist() == [[-1, -1], [-1, -1]]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_what_was_wrong_stays_with_its_prompt(monkeypatch, micro_batch_size):
    batches = collected(monkeypatch, [1, 0, 0, 1], micro_batch_size)
    found = [
        (scored.groups.prompts.identities[b], group[0][0])
        for scored in batches
        for b, group in enumerate(scored.score.problems)
    ]
    assert [problem for _, problem in found] == [f"unparsed: {index}" for index in (1, 0, 0, 1)]
    assert all(identity.endswith(f"prompt {problem[-1]}") for identity, problem in found), found


# --- targets of the attention term ------------------------------------------------------------------------------------


def test_mean_prompt_row_by_hand():
    """Two responses over two prompt columns and one of their own: of three rows two are real, of the other none."""
    policy = torch.tensor(
        [[[[0.25, 0.75, 0.0], [0.75, 0.25, 0.0], [0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]]]
    ).requires_grad_()
    mask = torch.tensor([[[True, True, False], [False, False, False]]])
    row = mean_prompt_row(policy, mask, 2)
    assert row.tolist() == [[[0.5, 0.5], [0.0, 0.0]]] and not row.requires_grad
    assert mean_prompt_row(policy, ~mask, 2).flatten().tolist() == pytest.approx([0.0, 1.0, 2 / 3, 1 / 3])


def test_success_row_by_hand():
    """Of the responses with A > 0, by A; a group without any gets no target."""
    rows = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]]).requires_grad_()
    target = success_row(rows, torch.tensor([[0.5, 1.5, -2.0], [0.0, 0.0, -1.0]]))
    assert target.tolist() == [[0.25, 0.75], [0.0, 0.0]] and not target.requires_grad
    assert success_row(rows, torch.tensor([[-1.0, 0.0, 3.0], [1.0, -1.0, 1.0]])).tolist() == [
        [0.5, 0.5],
        [0.75, 0.25],
    ]


def test_kept_rows_become_targets():
    """Rows as they are; for `hindsight` one row per group, by the attention term's own advantages."""
    rows = [{3: torch.rand(2, G, 3, generator=torch.Generator().manual_seed(index))} for index in range(2)]
    for target in ("old", "reference"):
        [batches] = assembled(rollout(), passes(), None, passes(rows), config(attention_target=target))
        assert [batch.target_attention[3] is kept[3] for batch, kept in zip(batches, rows)] == [True, True]
    for target in ("hindsight",):
        settings = config(attention_target=target, attention_keys="prompt")
        [batches] = assembled(rollout(), passes(), None, passes(rows), settings)
        for index, batch in enumerate(batches):
            kept, weights = rows[index][3], torch.tensor(REWARDS[2 * index : 2 * index + 2]).flip(1)
            wanted = torch.stack(
                [
                    sum(weights[b, g] * kept[b, g] for g in range(G)) / max(float(weights[b].sum()), 1e-9)
                    for b in range(2)
                ]
            )
            assert torch.allclose(batch.target_attention[3], wanted, atol=1e-6)
            assert torch.equal(batch.attention_advantages, weights)
    [batches] = assembled(rollout(), passes(), None, None, config(attention_target="oracle", attention_keys="visual"))
    assert all(batch.target_attention == {} for batch in batches)


# --- the control with shuffled advantages -----------------------------------------------------------------------------

KEYS = list(range(6))


def shuffled(monkeypatch, indices=KEYS, micro_batch_size=6, **settings) -> list[RolloutBatch]:
    rewards = torch.tensor([[0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0 + index] for index in indices])
    return collected(
        monkeypatch,
        indices,
        micro_batch_size,
        group_size=7,
        rewards=rewards,
        attention_advantages="shuffled",
        **settings,
    )


def test_shuffled_advantages_are_a_permutation_inside_each_group(monkeypatch):
    [scored] = shuffled(monkeypatch)
    own, other = scored.advantages, scored.attention_advantages
    assert torch.equal(own, group_advantages(scored.score.rewards)), "the token loss keeps its own"
    assert torch.equal(own.sort(dim=1).values, other.sort(dim=1).values)
    assert (own != other).any(dim=1).all() and len({tuple(row.tolist()) for row in other.argsort(dim=1)}) == 6


def test_the_order_belongs_to_seed_step_and_prompt_alone(monkeypatch):
    [first] = shuffled(monkeypatch)
    apart = shuffled(monkeypatch, micro_batch_size=2)
    assert torch.equal(torch.cat([scored.attention_advantages for scored in apart]), first.attention_advantages)
    [turned] = shuffled(monkeypatch, KEYS[::-1])
    assert torch.equal(turned.attention_advantages.flip(0), first.attention_advantages)
    [later], [seeded] = shuffled(monkeypatch, step=1), shuffled(monkeypatch, seed=1)
    for other in (later, seeded):
        assert torch.equal(other.advantages, first.advantages)
        assert (other.attention_advantages != first.attention_advantages).any(dim=1).all()


def test_every_place_is_as_likely():
    """Each of four responses stands in each place in a quarter of 4000 orders, to four standard errors."""
    order = shuffled_order([str(index) for index in range(4000)], 4, 0, 0)
    assert torch.equal(order.sort(dim=1).values, torch.arange(4).expand(4000, -1))
    shares = torch.nn.functional.one_hot(order, 4).double().mean(dim=0)
    assert (shares - 0.25).abs().max() < 4 * (0.25 * 0.75 / 4000) ** 0.5


# --- micro-batches of like lengths ------------------------------------------------------------------------------------


def test_longest_first_within_each_optimizer_step():
    assert longest_first([3, 5, 4, 4, 9, 1], 3) == [1, 2, 0, 4, 3, 5]
    assert longest_first([2, 2, 2], 3) == [0, 1, 2]  # equal ones keep their order


def test_micro_batches_of_a_number_of_groups():
    lengths, settings = [3, 5, 4, 4, 9, 1, 2, 2], MicroBatchSettings(2)
    assert cut_into_micro_batches(lengths, 4, settings, ALONE) == [[1, 2], [3, 0], [4, 6], [7, 5]]
    assert cut_into_micro_batches(lengths, 4, MicroBatchSettings(9), ALONE) == [[1, 2, 3, 0], [4, 6, 7, 5]]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("limit", [1, 50, 300, 10_000])
def test_micro_batches_of_a_number_of_tokens(seed, limit):
    """Every sample once, no micro-batch above the limit but a single sample, as many of them in every step."""
    generator = torch.Generator().manual_seed(seed)
    lengths, span = torch.randint(1, 120, (24,), generator=generator).tolist(), 8
    parts = cut_into_micro_batches(lengths, span, MicroBatchSettings(4, limit), ALONE)
    count = len(parts) // 3
    assert count * 3 == len(parts)
    for step in range(3):
        own = parts[step * count : (step + 1) * count]
        assert sorted(index for part in own for index in part) == list(range(step * span, (step + 1) * span))
    sizes = [sum(lengths[index] for index in part) for part in parts]
    assert all(size <= limit or len(part) == 1 for size, part in zip(sizes, parts))
    least = max(-(-sum(lengths[start : start + span]) // max(limit, max(lengths))) for start in (0, 8, 16))
    assert least <= count <= span
    assert count == {1: 8, 10_000: 1}.get(limit, count)


def test_micro_batches_are_even_and_can_be_split():
    lengths = [50, 30, 30, 20, 20, 10]
    parts = spread(lengths, range(6), 100)
    assert parts == [[0, 3, 5], [1, 2, 4]]  # 80 tokens each
    assert split_further(lengths, parts, 3) == [[0, 5], [3], [1, 2, 4]]
    assert sorted(split_further(lengths, parts, 6)) == [[0], [1], [2], [3], [4], [5]]


def test_all_ranks_have_as_many_micro_batches(monkeypatch):
    """The rank with the longest samples decides."""
    monkeypatch.setattr("megatron_ral.rollout.lengths.all_reduce_max_", lambda count, group: count + 2)
    assert len(cut_into_micro_batches([5, 5, 5, 5], 4, MicroBatchSettings(4, 20), ALONE)) == 3


def test_a_micro_batch_is_as_wide_as_its_longest(monkeypatch):
    """Four prompts of one optimizer step, lengths of prompts and responses crossed, in micro-batches of two."""
    lengths = {"prompt 0": 2, "prompt 1": 4, "prompt 2": 1, "prompt 3": 3}
    prompts = [
        replace(
            prompt(key),
            input_ids=torch.full((3 + index,), index),
            position_ids=torch.zeros(3, 3 + index),
            visual_mask=torch.zeros(3 + index, dtype=torch.bool),
            target_mask=torch.zeros(3 + index, dtype=torch.bool),
        )
        for index, key in enumerate(lengths)
    ]

    def sample(prompts, settings, *rest):
        for start in (0, 2):  # batches of the generation are cut otherwise
            batch = pad_prompts(prompts[start : start + 2], 0)
            longest = torch.tensor([lengths[item.sample.key] for item in batch.prompts])
            ids = longest[:, None, None].expand(-1, G, R).clone()
            yield SampledBatch(
                ResponseBatch(
                    batch,
                    ids,
                    torch.stack([longest, torch.ones_like(longest)], dim=1),
                    ids.float(),
                    torch.ones(2, G, dtype=torch.bool),
                ),
                None,
                (0, 0),
            )

    def score(responses, *rest):
        rewards = torch.tensor([[float(item.sample.key[-1]), 0.0] for item in responses.prompts.prompts])
        return Score(rewards, {"accuracy": rewards}, tuple(("", "") for _ in rewards), ())

    sampler = SimpleNamespace(sample=sample)
    monkeypatch.setattr(collect, "score_responses", score)
    engine, processor = ENGINE, PROCESSOR
    batches = collect.collect_rollout(
        engine, sampler, prompts, processor, RolloutSettings.from_config(config()), 0, MicroBatchSettings(2)
    ).batches
    keys = [item.sample.key for scored in batches for item in scored.groups.prompts.prompts]
    assert keys == ["prompt 3", "prompt 1", "prompt 2", "prompt 0"]  # 10, 9, 7 and 6 tokens
    assert [scored.groups.prompts.input_ids.shape[1] for scored in batches] == [6, 5]
    assert [scored.groups.response_ids.shape[2] for scored in batches] == [4, 2]
    for scored in batches:
        for b, item in enumerate(scored.groups.prompts.prompts):
            number = float(item.sample.key[-1])
            assert scored.score.rewards[b].tolist() == [number, 0.0]
            assert scored.groups.prompts.input_ids[b, : len(item.input_ids)].eq(number).all()
            assert scored.groups.response_lengths[b].tolist() == [lengths[item.sample.key], 1]
            assert scored.rollout_logprobs[b].eq(lengths[item.sample.key]).all()
