"""The whole loss that an engine calls back, against a float64 loop written from the formulas: values, gradients, signs.

A sign-flipped policy, KL, entropy or attention term, a wrong denominator, a mask left out, or a wrong share of a layer
fails here.
"""

import math

import pytest
import torch

from megatron_ral.config.sections import LossConfig
from megatron_ral.engine.protocol import AttentionRows, TokenOutputs
from megatron_ral.functional.attention_policy import attention_policy
from megatron_ral.models.group_layout import GroupLayout
from megatron_ral.training.objective import RalObjective, SftObjective, finish_metrics
from megatron_ral.types import GroupBatch, PromptBatch, StepTotals, TrainBatch

B, G, R, P = 2, 3, 4, 5
LENGTHS = torch.tensor([[4, 2, 3], [1, 4, 2]])
ADVANTAGES = torch.tensor([[1.2, -0.7, 0.0], [-1.1, 0.4, 0.9]], dtype=torch.float64)


def rand(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch(num_tokens, **parts) -> TrainBatch:
    """A micro-batch of a step that has `num_tokens` response tokens, 9 responses of at most 6 tokens."""
    prompts = PromptBatch(
        prompts=(None,) * B, input_ids=torch.zeros(B, P, dtype=torch.int64), prompt_lengths=torch.tensor([5, 3]),
        position_ids=torch.zeros(3, B, P, dtype=torch.int64), next_position=torch.tensor([5, 3]),
        visual_mask=torch.tensor([[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool(),
        target_mask=torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool())
    groups = GroupBatch(prompts, torch.zeros(B, G, R, dtype=torch.int64), LENGTHS)
    return TrainBatch(groups, StepTotals(num_tokens, 9, 6), **parts)


def rows(seed) -> tuple[torch.Tensor, AttentionRows]:
    """Logits that carry the gradient, and attention rows made of them."""
    layout = GroupLayout(torch.tensor([5, 3]), LENGTHS, P, R)
    logits = rand(B, G, R, P + R, seed=seed).requires_grad_()
    attention = torch.softmax(logits.masked_fill(~layout.visible_BGRS, float("-inf")), -1)
    return logits, AttentionRows(attention, attention_policy(attention, layout.self_RS), layout)


def slow_token_loss(new, old, ref, entropy, settings, num_tokens, groups=range(B)):
    """Token by token: weight * (policy + kl_coef * KL - entropy_coef * entropy)."""
    total = 0.0
    for b in groups:
        for g in range(G):
            length = int(LENGTHS[b, g])
            weight = {"token_mean": 1 / num_tokens, "sequence_mean": 1 / (9 * length),
                      "sequence_sum_norm": 1 / (9 * 6)}[settings.aggregation]
            sequence = sum(new[b, g, r] - old[b, g, r] for r in range(length)) / length
            for r in range(length):
                advantage, low, high = float(ADVANTAGES[b, g]), 1 - settings.clip_low, 1 + settings.clip_high
                ratio = torch.exp(sequence if settings.policy_loss == "gspo" else new[b, g, r] - old[b, g, r])
                clipped = torch.clamp(ratio, low, high)
                policy = -torch.minimum(ratio * advantage, clipped * advantage)
                if settings.policy_loss == "cispo":
                    policy = -clipped.detach() * advantage * new[b, g, r]
                if settings.dual_clip and advantage < 0:
                    policy = torch.clamp(policy, max=-settings.dual_clip * advantage)
                difference = ref[b, g, r] - new[b, g, r]
                kl = {"k1": -difference, "k2": difference ** 2 / 2,
                      "k3": torch.exp(difference) - difference - 1}[settings.kl_estimator]
                if settings.kl_clamp:
                    kl = torch.clamp(kl, -settings.kl_clamp, settings.kl_clamp)
                total = total + weight * (policy + settings.kl_coef * kl - settings.entropy_coef * entropy[b, g, r])
    return total


FAMILY = {
    "grpo": {}, "dapo": {"clip_high": 0.4, "dual_clip": 1.5, "entropy_coef": 0.3, "kl_clamp": 0.2},
    "grpo as published": {"aggregation": "sequence_mean"},
    "dr_grpo": {"aggregation": "sequence_sum_norm", "kl_estimator": "k1"},
    "gspo": {"policy_loss": "gspo", "aggregation": "sequence_mean", "kl_estimator": "k2", "clip_low": 0.05},
    "cispo": {"policy_loss": "cispo", "clip_low": 1.0, "entropy_coef": 0.3},
}


@pytest.mark.parametrize("num_tokens", [16, 40])
@pytest.mark.parametrize("name", FAMILY)
def test_token_loss_of_the_family(name, num_tokens):
    settings = LossConfig(**{"clip_low": 0.2, "clip_high": 0.3, "kl_coef": 0.7, **FAMILY[name]})
    new = (0.4 * rand(B, G, R, seed=1) - 2).requires_grad_()
    entropy = rand(B, G, R, seed=4).exp().requires_grad_()
    old, ref = 0.4 * rand(B, G, R, seed=2) - 2, 0.4 * rand(B, G, R, seed=3) - 2
    objective = RalObjective(settings, frozenset({3}))
    loss, metrics = objective.token_loss(TokenOutputs(new, entropy), batch(
        num_tokens, advantages=ADVANTAGES, old_logprobs=old, ref_logprobs=ref))
    wanted = slow_token_loss(new, old, ref, entropy, settings, num_tokens)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-12)
    padding = torch.arange(R) >= LENGTHS[..., None]
    for source in (new, entropy)[: 1 + (settings.entropy_coef > 0)]:
        ours, = torch.autograd.grad(loss, source, retain_graph=True)
        theirs, = torch.autograd.grad(wanted, source, retain_graph=True)
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-16) and ours.abs().max() > 1e-3
        assert not ours[padding].any()
    assert float(metrics["loss/token"]) == pytest.approx(float(wanted), rel=1e-12)
    # the log is a mean over tokens whatever the loss is
    assert float(metrics["entropy"]) == pytest.approx(float(entropy[~padding].sum()) / num_tokens)
    assert not any(value.requires_grad for value in metrics.values())
    assert settings.entropy_coef > 0 or not torch.autograd.grad(loss, entropy, allow_unused=True)[0]


def test_groups_that_take_no_part_leave_no_trace():
    """The second group alone: every term, its gradient and every metric, as if the first were not in the batch."""
    settings = LossConfig(kl_coef=0.7, entropy_coef=0.3, aggregation="sequence_mean")
    objective, parts = RalObjective(settings, frozenset({3})), {}
    new, entropy = (0.4 * rand(B, G, R, seed=1) - 2).requires_grad_(), rand(B, G, R, seed=4).exp()
    old, ref = 0.4 * rand(B, G, R, seed=2) - 2, 0.4 * rand(B, G, R, seed=3) - 2
    _, policy = rows(4)
    _, other = rows(5)
    for takes_part in ([False, True], [False, False]):
        train = batch(7, advantages=ADVANTAGES, old_logprobs=old, ref_logprobs=ref, takes_part=torch.tensor(takes_part),
                      target_attention={3: other.policy.detach()})
        loss, metrics = objective.token_loss(TokenOutputs(new, entropy), train)
        attention, more = objective.attention_loss(3, policy, train)
        gradient, = torch.autograd.grad(loss, new)
        parts[takes_part[1]] = loss, gradient, attention, {**metrics, **more}
    loss, gradient, attention, metrics = parts[True]
    wanted = slow_token_loss(new, old, ref, entropy, settings, 7, groups=[1])
    assert float(loss) == pytest.approx(float(wanted), rel=1e-12) and not gradient[0].any() and gradient[1].any()
    mask = (torch.arange(R) < LENGTHS[..., None]) & torch.tensor([False, True])[:, None, None]
    divergence = torch.tensor([[[float(slow_jsd(*pair)) for pair in zip(*group)] for group in zip(*prompt)]
                               for prompt in zip(policy.policy.detach(), other.policy.detach())]).double()
    assert float(attention) == pytest.approx(float((ADVANTAGES[..., None] * divergence * mask).sum() / 7), rel=1e-6)
    assert float(metrics["attention/divergence"]) == pytest.approx(float((divergence * mask).sum() / 7), rel=1e-6)
    assert float(metrics["ratio"]) == pytest.approx(float(((new - old).exp() * mask).sum() / 7))
    assert float(metrics["attention/divergence_negative:count"]) == 1  # the one token of the one response of A < 0
    loss, gradient, attention, metrics = parts[False]
    assert float(loss) == 0 and not gradient.any() and float(attention) == 0
    assert all(float(value) == 0 for value in metrics.values())


def test_token_loss_prefers_what_was_rewarded():
    """One gradient step down the loss must make tokens of A > 0 likelier and of A < 0 less likely (kl_coef = 0)."""
    new = torch.full((B, G, R), -2.0, dtype=torch.float64, requires_grad=True)
    loss, _ = RalObjective(LossConfig(kl_coef=0.0), frozenset({0})).token_loss(
        TokenOutputs(new, torch.ones_like(new)), batch(16, advantages=ADVANTAGES, old_logprobs=new.detach()))
    step = -torch.autograd.grad(loss, new)[0]
    mask = torch.arange(R) < LENGTHS[..., None]
    assert (torch.sign(step) == torch.sign(ADVANTAGES)[..., None] * mask).all()


def slow_jsd(p, q):
    terms = 0.0
    for a, b in zip(p, q):
        mean = (a + b) / 2
        if float(a) > 0:
            terms = terms + 0.5 * a * torch.log(a / mean)
        if float(b) > 0:
            terms = terms + 0.5 * b * torch.log(b / mean)
    return terms


@pytest.mark.parametrize("num_tokens, layers, coef", [(16, {3}, 1.0), (40, {1, 3}, 5.0)])
def test_attention_loss_of_ral(num_tokens, layers, coef):
    logits, policy = rows(4)
    _, other = rows(5)
    target = other.policy.detach()
    objective = RalObjective(LossConfig(attention_coef=coef), frozenset(layers))
    train = batch(num_tokens, advantages=ADVANTAGES, target_attention={3: target})
    loss, metrics = objective.attention_loss(3, policy, train)
    ours, = torch.autograd.grad(loss, logits, retain_graph=True)
    wanted, divergence, positive = 0.0, 0.0, []
    for b in range(B):
        for g in range(G):
            for r in range(int(LENGTHS[b, g])):
                value = slow_jsd(policy.policy[b, g, r], target[b, g, r])
                wanted = wanted + float(ADVANTAGES[b, g]) * value
                divergence += float(value)
                if ADVANTAGES[b, g] > 0:
                    positive.append(float(value))
    wanted = coef * wanted / (num_tokens * len(layers))
    theirs, = torch.autograd.grad(wanted, logits)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-10)
    assert torch.allclose(ours, theirs, atol=1e-13) and ours.abs().max() > 1e-4
    assert float(metrics["attention/divergence"]) == pytest.approx(divergence / (num_tokens * len(layers)), rel=1e-10)
    done = finish_metrics({name: float(value) for name, value in metrics.items()})
    assert done["attention/divergence_positive"] == pytest.approx(sum(positive) / len(positive), rel=1e-10)
    assert 0 <= done["attention/target_mass"] <= 1


def test_coefficient_zero_still_measures_and_parts_are_apart():
    _, policy = rows(4)
    _, other = rows(5)
    train = batch(16, advantages=ADVANTAGES, target_attention={3: other.policy.detach()})
    loss, metrics = RalObjective(LossConfig(attention_coef=0.0), frozenset({3})).attention_loss(3, policy, train)
    assert loss is None and float(metrics["attention/divergence"]) > 1e-3
    new = rand(B, G, R, seed=1).requires_grad_()
    only = RalObjective(LossConfig(), frozenset({3})).only_attention()
    assert float(only.token_loss(TokenOutputs(new, new), train)[0]) == 0.0
    assert float(only.attention_loss(3, policy, train)[0]) != 0.0


def test_masses_by_hand():
    """Uniform attention: masses are counts."""
    layout = GroupLayout(torch.tensor([5, 3]), LENGTHS, P, R)
    attention = layout.visible_BGRS.double() / layout.visible_BGRS.sum(-1, keepdim=True)
    uniform = AttentionRows(attention, attention_policy(attention, layout.self_RS), layout)
    train = batch(int(LENGTHS.sum()), advantages=ADVANTAGES, target_attention={0: uniform.policy})
    _, metrics = RalObjective(LossConfig(), frozenset({0})).attention_loss(0, uniform, train)
    values = finish_metrics({name: float(value) for name, value in metrics.items()})
    lengths, expected_visual, expected_self = [5, 3], 0.0, 0.0
    for b in range(B):
        for g in range(G):
            for r in range(int(LENGTHS[b, g])):
                expected_visual += 2 / (lengths[b] + r) / 16
                expected_self += 1 / (lengths[b] + r + 1) / 16
    assert values["attention/visual_mass"] == pytest.approx(expected_visual)
    assert values["attention/self_mass"] == pytest.approx(expected_self)
    assert values["attention/target_mass"] == pytest.approx(0.5)
    assert values["attention/divergence"] == 0.0


def test_supervised_loss():
    new = rand(B, G, R, seed=1).requires_grad_()
    loss, metrics = SftObjective().token_loss(TokenOutputs(new, new.detach()), batch(32))
    mask = torch.arange(R) < LENGTHS[..., None]
    assert float(loss) == pytest.approx(-float(new[mask].sum()) / 32)
    assert torch.equal(torch.autograd.grad(loss, new)[0], -mask.double() / 32)
    assert math.isclose(float(metrics["loss"]), float(loss))
