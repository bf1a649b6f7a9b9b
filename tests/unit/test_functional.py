"""The maths against hand numbers, slow float64 references and finite differences."""

import math

import pytest
import torch

from megatron_ral.functional.advantages import group_advantages, has_signal
from megatron_ral.functional.attention_loss import attention_rl_loss
from megatron_ral.functional.attention_policy import attention_policy, head_sum_attention
from megatron_ral.functional.divergence import jensen_shannon
from megatron_ral.functional.logprobs import (
    VocabPartials, combine_logprobs, entropy_gradient, logprob_gradient, vocab_partials)
from megatron_ral.functional.sampling import sample_tokens, uniform_stream
from megatron_ral.models.group_layout import GroupLayout


def distributions(*shape, seed=0, dtype=torch.float64):
    return torch.softmax(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), -1)


def slow_jsd(p, q):
    """Definition, entry by entry, in Python floats."""
    total = 0.0
    for a, b in zip(p.tolist(), q.tolist()):
        m = (a + b) / 2
        total += 0.5 * ((a * math.log(a / m) if a > 0 else 0.0) + (b * math.log(b / m) if b > 0 else 0.0))
    return total


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


# --- divergence -------------------------------------------------------------------------------------------------------

def test_jsd_equals_the_definition():
    p, q = distributions(20, 9, seed=1), distributions(20, 9, seed=2)
    expected = torch.tensor([slow_jsd(a, b) for a, b in zip(p, q)], dtype=torch.float64)
    assert torch.allclose(jensen_shannon(p, q), expected, rtol=1e-12, atol=0)


def test_jsd_of_disjoint_distributions_is_ln_2():
    p, q = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert float(jensen_shannon(p, q)) == pytest.approx(math.log(2), rel=1e-12)


@pytest.mark.parametrize("size", [1e-3, 1e-4, 1e-5])
def test_jsd_near_zero_is_positive_and_right_in_float32(size):
    """The naive float32 form is negative at this size; the signal of RAL lives here."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p32 = torch.softmax(logits, -1).float()
    q32 = torch.softmax(logits + size * torch.randn(50, generator=torch.Generator().manual_seed(1),
                                                    dtype=torch.float64), -1).float()
    truth = float(jensen_shannon(p32.double(), q32.double()))
    value = float(jensen_shannon(p32, q32))
    assert truth < 1e-6 and value > 0
    assert value == pytest.approx(truth, rel=1e-2)


def test_jsd_of_equal_is_exactly_zero_with_zero_gradient():
    p = distributions(5, 7, dtype=torch.float32).requires_grad_()
    value = jensen_shannon(p, p.detach().clone())
    value.sum().backward()
    assert torch.equal(value, torch.zeros(5)) and torch.equal(p.grad, torch.zeros_like(p))


def test_jsd_gradcheck_through_softmax():
    logits = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    q = distributions(4, 6, seed=4)
    assert torch.autograd.gradcheck(lambda x: jensen_shannon(torch.softmax(x, -1), q), (logits,))


def test_jsd_with_zero_entries_has_finite_value_and_gradient():
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0]], requires_grad=True)
    q = torch.tensor([[0.5, 0.0, 0.5, 0.0]])
    value = jensen_shannon(p, q)
    value.sum().backward()
    assert float(value) == pytest.approx(slow_jsd(p[0].detach().double(), q[0].double()), rel=1e-6)
    assert torch.isfinite(p.grad).all()


# --- attention policy -------------------------------------------------------------------------------------------------

def random_rows(dtype=torch.float64, B=2, G=2, R=3, P=4, n=4, k=2, D=5):
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    layout = GroupLayout(torch.tensor([4, 2]), torch.tensor([[3, 2], [1, 3]]), P, R)
    return make(B, G, R, n, D), make(B, P, k, D), make(B, G, R, k, D), layout


def slow_policy(query, prompt_key, response_key, layout, scale):
    """Row by row, head by head, from the definition (paper eq. 2): head mean, drop self, renormalise."""
    B, G, R, n, _ = query.shape
    k, P = prompt_key.shape[2], prompt_key.shape[1]
    policy = torch.zeros(B, G, R, P + R, dtype=query.dtype)
    for b in range(B):
        for g in range(G):
            for r in range(R):
                length = int(layout.prompt_lengths[b])
                columns = list(range(length)) + [P + step for step in range(r + 1)]
                mean = torch.zeros(len(columns), dtype=query.dtype)
                for h in range(n):
                    keys = torch.cat([prompt_key[b, :length, h // (n // k)], response_key[b, g, : r + 1, h // (n // k)]])
                    mean += torch.softmax(keys @ query[b, g, r, h] * scale, -1) / n
                without_self = mean[:-1] / mean[:-1].sum()
                policy[b, g, r, columns[:-1]] = without_self
    return policy


def test_attention_policy_equals_the_definition():
    query, prompt_key, response_key, layout = random_rows()
    attention = head_sum_attention(query, prompt_key, response_key, layout.visible_BGRS, 0.4) / 4
    policy = attention_policy(attention, layout.self_RS)
    assert torch.allclose(policy, slow_policy(query, prompt_key, response_key, layout, 0.4), atol=1e-14)
    assert torch.allclose(attention.sum(-1), torch.ones_like(attention[..., 0]))


def test_heads_are_averaged_before_renormalising():
    """The other order is another distribution; the test must see the difference."""
    query, prompt_key, response_key, layout = random_rows()
    each = [attention_policy(head_sum_attention(query[:, :, :, h:h + 1], prompt_key[:, :, h // 2:h // 2 + 1],
                                                response_key[:, :, :, h // 2:h // 2 + 1], layout.visible_BGRS, 0.4),
                             layout.self_RS) for h in range(4)]
    wrong = torch.stack(each).mean(0)
    right = slow_policy(query, prompt_key, response_key, layout, 0.4)
    assert (wrong - right).abs().max() > 1e-3


def test_head_shards_add_up():
    query, prompt_key, response_key, layout = random_rows()
    whole = head_sum_attention(query, prompt_key, response_key, layout.visible_BGRS, 0.4)
    parts = [head_sum_attention(query[:, :, :, 2 * i:2 * i + 2], prompt_key[:, :, i:i + 1], response_key[:, :, :, i:i + 1],
                                layout.visible_BGRS, 0.4) for i in range(2)]
    assert torch.allclose(sum(parts), whole, atol=1e-14)


def test_rows_of_bfloat16_inputs_are_float32():
    query, prompt_key, response_key, layout = random_rows(torch.bfloat16)
    assert head_sum_attention(query, prompt_key, response_key, layout.visible_BGRS, 0.4).dtype == torch.float32


def test_padding_of_prompt_and_response_changes_nothing():
    query, prompt_key, response_key, layout = random_rows()
    policy = slow_policy(query, prompt_key, response_key, layout, 0.4)
    noise = torch.full_like(prompt_key[:, :2], 50.0)
    wide = GroupLayout(layout.prompt_lengths, layout.response_lengths, 6, 3)
    padded = attention_policy(head_sum_attention(query, torch.cat([prompt_key, noise], 1), response_key,
                                                 wide.visible_BGRS, 0.4) / 4, wide.self_RS)
    assert torch.equal(padded[..., 4:6], torch.zeros_like(padded[..., 4:6]))
    assert torch.allclose(torch.cat([padded[..., :4], padded[..., 6:]], -1), policy, atol=1e-14)


# --- attention loss ---------------------------------------------------------------------------------------------------

def test_attention_loss_value_sign_and_gradcheck():
    query, prompt_key, response_key, layout = random_rows()
    target = slow_policy(query.flip(2), prompt_key.flip(1), response_key, layout, 0.4)
    advantages = torch.tensor([[1.5, -0.5], [0.0, 2.0]], dtype=torch.float64)

    def loss(query, prompt_key, response_key):
        attention = head_sum_attention(query, prompt_key, response_key, layout.visible_BGRS, 0.4) / 4
        return attention_rl_loss(attention_policy(attention, layout.self_RS), target, advantages)[0]

    value = loss(query, prompt_key, response_key)
    policy = slow_policy(query, prompt_key, response_key, layout, 0.4)
    for b in range(2):
        for g in range(2):
            for r in range(3):
                expected = float(advantages[b, g]) * slow_jsd(policy[b, g, r], target[b, g, r])
                assert float(value[b, g, r]) == pytest.approx(expected, rel=1e-10, abs=1e-15)
    assert (value[0, 0] > 0).all() and (value[0, 1] < 0).all(), "A > 0 must be a cost of moving away, A < 0 a gain"
    inputs = tuple(tensor.clone().requires_grad_() for tensor in (query, prompt_key, response_key))
    assert torch.autograd.gradcheck(loss, inputs, atol=1e-7)


def test_gradient_step_moves_with_the_sign_of_the_advantage():
    """Minimising the loss must bring a row nearer to its target where A > 0 and farther where A < 0."""
    target = distributions(1, 1, 1, 6, seed=5)
    for advantage, nearer in ((1.0, True), (-1.0, False)):
        logits = torch.randn(1, 1, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6),
                             requires_grad=True)
        loss, before = attention_rl_loss(torch.softmax(logits, -1), target, torch.tensor([[advantage]]))
        loss.sum().backward()
        after = jensen_shannon(torch.softmax(logits.detach() - 0.1 * logits.grad, -1), target)
        assert (float(after) < float(before)) == nearer


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
    total = VocabPartials(*(sum(getattr(partial, name) for partial in partials)
                            for name in ("sum_exp", "target_logit", "weighted_logit")))
    ours, entropy = combine_logprobs(total)
    assert torch.allclose(ours, picked.detach(), atol=1e-14)
    assert torch.allclose(entropy, -(logprobs.exp() * logprobs).sum(-1).detach(), atol=1e-13)
    gradient = torch.cat([logprob_gradient(shard, targets, maximum, total.sum_exp, grad, 4 * index)
                          for index, shard in enumerate(shards)], -1)
    assert torch.allclose(gradient, logits.grad, atol=1e-14)
    wanted, = torch.autograd.grad(-(logprobs.exp() * logprobs).sum(-1), logits, grad)
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


def test_streams_belong_to_the_sample():
    assert torch.equal(uniform_stream(5, 0, 1, "key", 2), uniform_stream(5, 0, 1, "key", 2))
    assert not torch.equal(uniform_stream(5, 0, 1, "key", 2), uniform_stream(5, 0, 1, "key", 3))


# --- masses -----------------------------------------------------------------------------------------------------------

def test_row_mass_by_hand():
    from megatron_ral.functional.attention_mass import row_mass

    policy = torch.tensor([[[[0.1, 0.2, 0.3, 0.4, 0.0], [0.5, 0.0, 0.0, 0.2, 0.3]]]])  # P = 4, R = 1 own column
    visual, target = torch.tensor([[False, True, True, False]]), torch.tensor([[False, False, True, False]])
    mass = row_mass(policy, visual, target, torch.tensor([[[True, True]]]))
    assert mass.visual.flatten().tolist() == pytest.approx([0.5, 0.0])
    assert mass.target_share.flatten().tolist() == pytest.approx([0.6, 0.0])
    assert mass.annotated.flatten().tolist() == [True, True]
    without = row_mass(policy, visual, torch.zeros_like(target), torch.tensor([[[True, False]]]))
    assert not without.annotated.any()
