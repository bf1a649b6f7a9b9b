"""Advantages, log-probabilities and sampling against numbers by hand and slow float64 references.

Attention is tested in test_attention_rows.py.
"""

import math

import pytest
import torch

from megatron_ral.functional.advantages import group_advantages, has_signal
from megatron_ral.functional.logprobs import (
    VocabPartials,
    combine_logprobs,
    entropy_gradient,
    logprob_gradient,
    vocab_partials,
)
from megatron_ral.functional.sampling import likeliest_on_host, sample_candidates, sample_tokens, uniform_stream

# --- advantages -------------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]]))
    # mean 0.5, std (ddof 1) = sqrt(4 * 0.25 / 3)
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    assert torch.allclose(advantages[0], torch.tensor([expected, -expected, -expected, expected]), atol=1e-6)
    assert advantages[1].tolist() == [0.0, 0.0, 0.0, 0.0]


def test_advantages_without_scale_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1], [4.0, 0.0, 2.0, 2.0]])
    advantages = group_advantages(rewards, scale="none")
    assert advantages.tolist() == [[0.75, -0.25, -0.25, -0.25], [0.0] * 4, [2.0, -2.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="batch"):
        group_advantages(rewards, scale="batch")


def test_signal_is_any_difference_of_rewards():
    rewards = torch.tensor([[0.3, 0.3, 0.3], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.1, 0.1, 0.1 + 1e-7]])
    assert has_signal(rewards).tolist() == [False, True, False, True]
    assert (group_advantages(rewards) != 0).any(1).tolist() == has_signal(rewards).tolist()


def test_advantages_refuse_groups_of_one():
    for function in (group_advantages, has_signal):
        with pytest.raises(ValueError, match="G >= 2"):
            function(torch.zeros(3, 1))


# --- log-probabilities (the losses made of them: test_policy_losses.py) -----------------------------------------------


def test_vocabulary_shards_give_log_softmax_entropy_and_gradient():
    logits = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets, grad = torch.tensor([0, 5, 11]), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    logprobs = torch.log_softmax(logits, -1)
    picked = logprobs.gather(-1, targets[:, None])[:, 0]
    picked.backward(grad, retain_graph=True)
    maximum = logits.detach().max(-1).values
    shards = logits.detach().chunk(3, -1)
    partials = [vocab_partials(shard, targets, maximum, 4 * index) for index, shard in enumerate(shards)]
    total = VocabPartials(
        *(sum(getattr(partial, name) for partial in partials) for name in ("sum_exp", "target_logit", "weighted_logit"))
    )
    ours, entropy = combine_logprobs(total)
    assert torch.allclose(ours, picked.detach(), atol=1e-14)
    assert torch.allclose(entropy, -(logprobs.exp() * logprobs).sum(-1).detach(), atol=1e-13)
    gradient = torch.cat(
        [
            logprob_gradient(shard, targets, maximum, total.sum_exp, grad, 4 * index)
            for index, shard in enumerate(shards)
        ],
        -1,
    )
    assert torch.allclose(gradient, logits.grad, atol=1e-14)
    (wanted,) = torch.autograd.grad(-(logprobs.exp() * logprobs).sum(-1), logits, grad)
    gradient = torch.cat([entropy_gradient(shard, maximum, total, grad) for shard in shards], -1)
    assert torch.allclose(gradient, wanted, atol=1e-14) and wanted.abs().max() > 0.1


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_greedy_and_top_p():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]).double())
    assert sample_tokens(logits, torch.tensor([0.99]), temperature=0).tolist() == [0]
    draws = torch.linspace(0, 1 - 1e-9, 1001, dtype=torch.float64)
    tokens = sample_tokens(logits.expand(1001, -1), draws, temperature=1.0, top_p=0.7)
    counts = torch.bincount(tokens, minlength=4) / 1001
    assert counts.tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=2e-3)


def test_sampling_follows_the_distribution_at_a_temperature():
    logits = torch.tensor([[1.0, 0.0, -1.0]]).double()
    draws = torch.linspace(0, 1 - 1e-9, 4001, dtype=torch.float64)
    counts = torch.bincount(sample_tokens(logits.expand(4001, -1), draws, 2.0), minlength=3) / 4001
    assert counts.tolist() == pytest.approx(torch.softmax(logits[0] / 2, -1).tolist(), abs=1e-3)


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("num_candidates", [1, 5, 16, 20])
def test_candidates_settle_only_what_the_whole_vocabulary_would_draw(top_p, num_shards, num_candidates):
    """Shards of 20 tokens, each of which gives its largest logits; many ties."""
    generator = torch.Generator().manual_seed(num_candidates)
    spread = torch.linspace(0.1, 6, 400)[:, None]  # from flat to peaked
    logits = (torch.randn(400, 20 * num_shards, generator=generator) * spread * 2).round() / 2
    logits[:, 3] = -math.inf
    logits[0] = 0.0
    uniform = torch.rand(400, generator=generator, dtype=torch.float64)
    uniform[::7], uniform[1::7] = 0.0, 1 - 1e-9
    ids, least = [], []
    for start in range(0, 20 * num_shards, 20):
        shard = logits[:, start : start + 20]
        chosen = shard.topk(num_candidates).indices.sort(-1).values
        ids.append(chosen + start)
        least.append(shard.gather(1, chosen).amin(1) if num_candidates < 20 else torch.full((400,), -math.inf))
    ids, maximum = torch.cat(ids, 1), logits.amax(1)
    total = ((logits.double() - maximum[:, None]) / 0.7).exp().sum(1)
    numbers = torch.stack(least).amax(0), maximum, total, uniform, 0.7, top_p
    token, settled = sample_candidates(logits.gather(1, ids), ids, *numbers)
    wanted = sample_tokens(logits, uniform, 0.7, top_p)
    assert torch.equal(sample_tokens(logits, uniform, 0.7, top_p, on_host=True), wanted)
    mixed = ids.flip(1)
    on_host = sample_candidates(logits.gather(1, mixed), mixed, *numbers, on_host=True)
    assert torch.equal(on_host[0], token) and torch.equal(on_host[1], settled)
    assert torch.equal(token[settled], wanted[settled])
    if num_candidates == 20:
        assert settled.all()
    elif num_candidates > 1:
        assert settled.sum() > 50 and (top_p < 0.5 or not settled.all())
    if num_candidates == 16:
        assert len(wanted[settled].unique()) > 10


def test_the_likeliest_on_the_host_are_those_of_topk():
    logits = torch.randn(40, 500, generator=torch.Generator().manual_seed(0))
    logits[:, ::7] = -math.inf
    logits[1], logits[2] = -0.0, logits[2].round()
    for count in (1, 5, 499, 500):
        ids = likeliest_on_host(logits, count)
        assert ids.dtype == torch.int64 and all(len(row.unique()) == count for row in ids)
        assert torch.equal(logits.gather(1, ids).sort(1).values, logits.topk(count).values.sort(1).values)


def test_streams_belong_to_the_sample():
    assert torch.equal(uniform_stream(5, 0, 1, "key", 2), uniform_stream(5, 0, 1, "key", 2))
    assert not torch.equal(uniform_stream(5, 0, 1, "key", 2), uniform_stream(5, 0, 1, "key", 3))
