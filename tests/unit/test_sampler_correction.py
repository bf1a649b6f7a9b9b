"""Importance weights against the sampler: a loop in float64, no gradient, padding, micro-batches, what is refused."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_ral.config import load_config
from megatron_ral.errors import ConfigError
from megatron_ral.functional.sampler_correction import LOG_RATIO_BOUND, sampler_correction
from megatron_ral.objectives.base import TokenOutputs, add_metrics, finish_metrics, mean_over_updates
from tests.unit.test_objective import ADVANTAGES, LENGTHS, REAL, B, G, R, batch, make_objective, rand, slow_token_loss

MODES = ("token_truncate", "sequence_mask")
OLD, NEW, REF = (0.4 * rand(B, G, R, seed=seed) - 2 for seed in (2, 1, 3))
SAMPLER = OLD + 0.5 * rand(B, G, R, seed=9)


def slow_correction(mode, cap=2.0):
    """(weights, ratios of what counts, number above the cap), one token after another."""
    weights, ratios = torch.ones(B, G, R, dtype=torch.float64), []
    for b in range(B):
        for g in range(G):
            logs = [float(OLD[b, g, r] - SAMPLER[b, g, r]) for r in range(int(LENGTHS[b, g]))]
            if mode == "token_truncate":
                for r, log in enumerate(logs):
                    ratios.append(math.exp(log))
                    weights[b, g, r] = min(ratios[-1], cap)
            else:
                ratios.append(math.prod(map(math.exp, logs)))
                weights[b, g, : len(logs)] = ratios[-1] if ratios[-1] <= cap else 0.0
    return weights, ratios, sum(ratio > cap for ratio in ratios)


@pytest.mark.parametrize("cap", [1.2, 2.0])
@pytest.mark.parametrize("mode", MODES)
def test_weights_equal_a_loop_and_carry_no_gradient(mode, cap):
    old, sampler = OLD.clone().requires_grad_(), SAMPLER.masked_fill(~REAL, float("nan")).requires_grad_()
    found = sampler_correction(old, sampler, REAL, mode, cap)
    weights, ratios, above = slow_correction(mode, cap)
    assert torch.allclose(found.weights, weights, rtol=1e-12, atol=0)
    assert sorted(found.ratios[found.counts].tolist()) == pytest.approx(sorted(ratios), rel=1e-12)
    assert int(found.is_cut.sum()) == above and 0 < above < len(ratios)
    assert not any(part.requires_grad for part in (found.weights, found.ratios))


@pytest.mark.parametrize("mode", MODES)
def test_extreme_ratios_stay_finite_and_fall_under_the_bound(mode):
    """A sampler that all but excluded a token, and one that was sure of what the policy excludes."""
    mask, far = torch.ones(1, 2, 1, dtype=torch.bool), torch.tensor([[[-500.0], [500.0]]])
    found = sampler_correction(far, torch.zeros_like(far), mask, mode, 2.0)
    assert found.ratios.flatten().tolist() == pytest.approx([0.0, math.exp(LOG_RATIO_BOUND)])
    assert found.weights.flatten().tolist() == [0.0, 2.0 if mode == "token_truncate" else 0.0]
    with pytest.raises(ValueError, match="'token_mask' is not one of"):
        sampler_correction(far, far, mask, "token_mask", 2.0)


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_policy_loss_is_weighted_and_the_other_terms_are_not(mode, on_policy):
    settings = {"clip_low": 0.2, "clip_high": 0.3, "kl_coef": 0.7, "entropy_coef": 0.3}
    objective = make_objective(sampler_correction=mode, **settings).only("policy_gradient")
    plain = make_objective(**settings).only("policy_gradient")
    new = (OLD if on_policy else NEW).clone().requires_grad_()
    entropy = rand(B, G, R, seed=4).exp().requires_grad_()
    parts = {"old_logprobs": None if on_policy else OLD, "is_on_policy": on_policy, "ref_logprobs": REF}
    sampled = batch(16, rollout_logprobs=SAMPLER.masked_fill(~REAL, float("nan")), **parts)
    loss, metrics = objective.token_loss(TokenOutputs(new, entropy), sampled)
    without, _ = plain.token_loss(TokenOutputs(new, entropy), sampled)

    weights, ratios, above = slow_correction(mode)
    surrogate = slow_policy_loss(new, OLD, weights)
    rest = slow_token_loss(new, OLD, REF, entropy, plain.terms[0].settings, 16) - slow_policy_loss(
        new, OLD, torch.ones_like(weights)
    )
    wanted = surrogate + rest
    assert float(loss) == pytest.approx(float(wanted), rel=1e-12) and abs(float(loss - without)) > 1e-4
    for source in (new, entropy):
        ours, theirs = (torch.autograd.grad(value, source, retain_graph=True)[0] for value in (loss, wanted))
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-16) and not ours[~REAL].any()
    done = finish_metrics({name: float(value) for name, value in metrics.items()})
    assert done["sampling/ratio_mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-12)
    assert done["sampling/ratio_max"] == pytest.approx(max(ratios), rel=1e-12)
    assert done["sampling/ratio_cut"] == pytest.approx(above / len(ratios)) and above


def slow_policy_loss(new, old, weights):
    total = 0.0
    for b, g, r in REAL.nonzero().tolist():
        advantage, ratio = float(ADVANTAGES[b, g]), torch.exp(new[b, g, r] - old[b, g, r])
        clipped = torch.clamp(ratio, 0.8, 1.3)
        total = total - float(weights[b, g, r]) * torch.minimum(ratio * advantage, clipped * advantage) / 16
    return total


@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_that_of_a_constant_weight(mode):
    """On policy p_old has the value of the policy: a weight that was not detached would fail the check."""
    objective = make_objective(sampler_correction=mode, kl_coef=0.0, clip_low=5.0, clip_high=5.0)
    constant = batch(16, rollout_logprobs=SAMPLER, old_logprobs=OLD)
    assert torch.autograd.gradcheck(
        lambda new: objective.token_loss(TokenOutputs(new, torch.ones_like(new)), constant)[0],
        NEW.clone().requires_grad_(),
    )
    gradients = []
    for part in (constant, replace(constant, is_on_policy=True, old_logprobs=None)):
        new = OLD.clone().requires_grad_()
        loss, _ = objective.token_loss(TokenOutputs(new, torch.ones_like(new)), part)
        gradients += torch.autograd.grad(loss, new)
    assert torch.equal(*gradients) and gradients[0].any()


@pytest.mark.parametrize("mode", MODES)
def test_cut_and_padding_change_neither_loss_nor_metrics(mode):
    """Micro-batches of one group each, three columns wider, against one of all groups."""
    objective = make_objective(sampler_correction=mode)
    whole = batch(16, rollout_logprobs=SAMPLER, old_logprobs=OLD)
    loss, metrics = objective.token_loss(TokenOutputs(NEW, torch.ones_like(NEW)), whole)
    total, sums = 0.0, dict[str, torch.Tensor]()
    for b in range(B):
        mask = torch.arange(B) == b
        part, measured = objective.token_loss(
            TokenOutputs(wider(NEW), wider(torch.ones_like(NEW))),
            replace(
                whole,
                groups=replace(whole.groups, response_ids=wider(whole.groups.response_ids)),
                group_mask=mask,
                old_logprobs=wider(OLD),
                rollout_logprobs=wider(SAMPLER.masked_fill(~mask[:, None, None], math.nan), math.nan),
            ),
        )
        total += float(part)
        add_metrics(sums, measured)
    assert total == pytest.approx(float(loss), rel=1e-12)
    done, wanted = (finish_metrics({name: float(value) for name, value in of.items()}) for of in (sums, metrics))
    for name in ("sampling/ratio_mean", "sampling/ratio_max", "sampling/ratio_cut"):
        assert done[name] == pytest.approx(wanted[name], rel=1e-12), name


def wider(rows, value=0):
    return torch.nn.functional.pad(rows, (0, 3), value=value)


def test_off_is_bit_for_bit_as_if_the_setting_did_not_exist():
    """With `none` the sampler's log-probabilities are not read at all, and no metric is logged."""
    outputs = TokenOutputs(NEW.float(), torch.ones(B, G, R))
    results = [
        make_objective(**settings).token_loss(outputs, batch(16, old_logprobs=OLD.float(), rollout_logprobs=sampler))
        for settings, sampler in (({}, SAMPLER), ({"sampler_correction": "none"}, torch.full_like(SAMPLER, math.nan)))
    ]
    assert torch.equal(results[0][0], results[1][0]) and results[0][0].isfinite()
    assert not any(name.startswith("sampling") for _, metrics in results for name in metrics)
    off = make_objective(policy_coef=0.0, sampler_correction="token_truncate")
    _, metrics = off.token_loss(outputs, batch(16, old_logprobs=OLD.float(), rollout_logprobs=SAMPLER))
    assert not any(name.startswith("sampling") for name in metrics), "there is no policy loss to weight"


def test_the_largest_ratio_of_all_updates_is_logged_and_the_mean_of_means():
    updates = [{"sampling/ratio_max": 3.0, "kl": 1.0}, {"sampling/ratio_max": 7.0, "kl": 2.0, "lr": 0.5}]
    assert mean_over_updates(updates) == {"kl": 1.5, "lr": 0.5, "sampling/ratio_max": 7.0}


@pytest.mark.parametrize("cap", [1.0, 0.5, 1e7])
def test_a_cap_that_cuts_equal_samplers_is_refused(tmp_path, cap):
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: m}\ndata: {train: [{shards: a}]}\n")
    with pytest.raises(ConfigError, match=r"loss\.sampler_correction_cap") as error:
        load_config(file, [f"loss.sampler_correction_cap={cap}"])
    assert str(cap) in str(error.value)
