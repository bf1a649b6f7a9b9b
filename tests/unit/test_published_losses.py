"""Aggregated values and gradients of our losses against the formulas of TRL and verl on the same numbers.

The formulas are written anew from the sources below. Their sequences are flat ([B * G, R]), ours are grouped.

    TRL   huggingface/trl   trl/trainer/grpo_trainer.py     commit f2cd57710ae345ea6428ae95363267fcf38a3dc8
    verl  volcengine/verl   verl/trainer/ppo/core_algos.py  commit b178a3cd56f58b2d502255daba591e92833930a7
          for weights against the sampler verl/trainer/ppo/rollout_corr_helper.py of the same commit
"""

import pytest
import torch

from megatron_ral.functional.advantages import group_advantages
from megatron_ral.functional.aggregation import token_weights
from megatron_ral.functional.kl import kl_estimate
from megatron_ral.functional.sampler_correction import sampler_correction
from megatron_ral.functional.surrogates import cispo_loss, grpo_loss, gspo_loss

B, G, R, LIMIT = 3, 4, 6, 11
LENGTHS = torch.tensor([[6, 1, 3, 4], [2, 5, 5, 3], [1, 2, 6, 4]])
MASK = torch.arange(R) < LENGTHS[..., None]
FLAT = MASK.flatten(0, 1).double()
TOTALS = {"num_tokens": int(LENGTHS.sum()), "num_sequences": B * G, "max_response_length": LIMIT}


def rand(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


NEW, OLD, REF = (0.8 * rand(B, G, R, seed=seed) - 3 for seed in (1, 2, 3))
ADVANTAGES = rand(B, G, seed=4)


def compare(ours, theirs):
    """Assert equal values and equal, non-zero gradients of two functions of log-probabilities [B, G, R]."""
    new = NEW.clone().requires_grad_()
    (value, wanted) = ours(new), theirs(new)
    gradient, wanted_gradient = (torch.autograd.grad(loss, new)[0] for loss in (value, wanted))
    assert float(value) == pytest.approx(float(wanted), rel=1e-7)  # verl adds 1e-8 to a length
    assert torch.allclose(gradient, wanted_gradient, rtol=1e-7, atol=1e-16)
    assert wanted_gradient.abs().max() > 1e-3


def ours(function, mode, **bounds):
    return lambda new: (function(new, OLD, ADVANTAGES, MASK, **bounds).loss * token_weights(MASK, mode, **TOTALS)).sum()


# --- TRL --------------------------------------------------------------------------------------------------------------


def trl(loss_type, level="token", epsilon=0.2, epsilon_high=0.3):
    """Lines 3054-3091 (per token) and 3124-3142 (aggregation), in one process with one accumulation step."""

    def loss(new):
        logp, old, A = new.flatten(0, 1), OLD.flatten(0, 1), ADVANTAGES.flatten()[:, None]
        log_weight = logp - old
        if level == "sequence":
            log_weight = ((log_weight * FLAT).sum(1) / FLAT.sum(1))[:, None]
        weight = log_weight.exp()
        if loss_type == "cispo":  # epsilon_high is the bound itself
            per_token = -weight.clamp(max=epsilon_high).detach() * A * logp
        else:
            per_token = torch.maximum(-weight * A, -weight.clamp(1 - epsilon, 1 + epsilon_high) * A)
        summed = (per_token * FLAT).sum(1)
        return {
            "grpo": (summed / FLAT.sum(1)).mean(),
            "dr_grpo": summed.sum() / (len(FLAT) * LIMIT),
            "dapo": summed.sum() / FLAT.sum(),
            "cispo": summed.sum() / FLAT.sum(),
        }[loss_type]

    return loss


@pytest.mark.parametrize(
    "loss_type, mode", [("grpo", "sequence_mean"), ("dr_grpo", "sequence_sum_norm"), ("dapo", "token_mean")]
)
def test_trl_clipped_losses(loss_type, mode):
    compare(ours(grpo_loss, mode, clip_low=0.2, clip_high=0.3), trl(loss_type))


@pytest.mark.parametrize("loss_type, mode", [("grpo", "sequence_mean"), ("dapo", "token_mean")])
def test_trl_sequence_level_is_gspo(loss_type, mode):
    """TRL's ratio carries the gradient of the mean, ours that of the token: the sums over a response agree."""
    compare(ours(gspo_loss, mode, clip_low=0.05, clip_high=0.1), trl(loss_type, "sequence", 0.05, 0.1))


def test_trl_cispo_has_one_absolute_bound():
    compare(ours(cispo_loss, "token_mean", clip_low=1.0, clip_high=0.5), trl("cispo", epsilon_high=1.5))


def test_trl_kl_and_advantages():
    """Lines 3071-3073: exp(d) - d - 1 without clamps. Lines 2705-2707: std + 1e-4, ddof 1; "none": no std."""
    weights = token_weights(MASK, "token_mean", **TOTALS)
    compare(
        lambda new: (kl_estimate(new, REF, "k3") * weights).sum(),
        lambda new: (((REF - new).exp() - (REF - new) - 1) * MASK).sum() / MASK.sum(),
    )
    rewards = torch.tensor([[1.0, 0.0, 0.9, 0.1], [0.1, 0.1, 0.1, 1.0], [0.3, 0.3, 0.3, 0.3]], dtype=torch.float64)
    centred = rewards - rewards.mean(1, keepdim=True)
    scaled = centred / ((centred.square().sum(1, keepdim=True) / (G - 1)).sqrt() + 1e-4)
    assert torch.allclose(group_advantages(rewards, 1e-4), scaled.float(), atol=1e-6)
    assert torch.allclose(group_advantages(rewards, scale="none"), centred.float(), atol=1e-7)
    assert scaled.abs().max() > 1


# --- verl -------------------------------------------------------------------------------------------------------------


def verl_aggregate(per_token, mode):
    """Lines 1055-1076 (`agg_loss`) for one data-parallel rank, with the counts of the global batch."""
    per_sequence = (per_token * FLAT).sum(1)
    if mode == "token-mean":
        return per_sequence.sum() / TOTALS["num_tokens"]
    if mode == "seq-mean-token-mean":
        return (per_sequence / (FLAT.sum(1) + 1e-8)).sum() / TOTALS["num_sequences"]
    assert mode == "seq-mean-token-sum-norm"  # at this commit a sum over loss_scale_factor; the mean is in the factor
    return per_sequence.sum() / (TOTALS["num_sequences"] * LIMIT)


def verl(policy, mode, low=0.2, high=0.3, c=3.0, weights=1.0):
    """`vanilla` lines 1210-1235, `gspo` 1286-1305, `cispo` 1743-1758; weights against the sampler 1239, 1309, 1765."""

    def loss(new):
        logp, old, A = new.flatten(0, 1), OLD.flatten(0, 1), ADVANTAGES.flatten()[:, None]
        difference = logp - old
        if policy == "gspo":
            mean = (difference * FLAT).sum(1, keepdim=True) / FLAT.sum(1, keepdim=True)
            ratio = (mean.detach() + logp - logp.detach()).clamp(max=10.0).exp()
        else:
            ratio = difference.clamp(-20.0, 20.0).exp()
        bounded = ratio.clamp(1 - low, 1 + high)
        if policy == "cispo":
            return verl_aggregate(-bounded.detach() * A * logp * weights, mode)
        per_token = torch.maximum(-A * ratio, -A * bounded)
        if policy == "vanilla":
            per_token = torch.where(A < 0, torch.minimum(-A * c, per_token), per_token)
        return verl_aggregate(per_token * weights, mode)

    return loss


@pytest.mark.parametrize(
    "mode, theirs",
    [
        ("token_mean", "token-mean"),
        ("sequence_mean", "seq-mean-token-mean"),
        ("sequence_sum_norm", "seq-mean-token-sum-norm"),
    ],
)
@pytest.mark.parametrize("dual_clip", [3.0, 1.5])
def test_verl_vanilla_with_dual_clip(mode, theirs, dual_clip):
    bounds = {"clip_low": 0.2, "clip_high": 0.3}
    compare(ours(grpo_loss, mode, **bounds, dual_clip=dual_clip), verl("vanilla", theirs, c=dual_clip))
    acts = (
        grpo_loss(NEW, OLD, ADVANTAGES, MASK, **bounds, dual_clip=dual_clip).loss
        != grpo_loss(NEW, OLD, ADVANTAGES, MASK, **bounds).loss
    )
    assert (acts & MASK).any(), "the comparison must see the dual clip act"


def test_verl_gspo_forces_a_mean_of_sequences():
    compare(
        ours(gspo_loss, "sequence_mean", clip_low=0.05, clip_high=0.1), verl("gspo", "seq-mean-token-mean", 0.05, 0.1)
    )


@pytest.mark.parametrize("low", [0.2, 10.0])  # 10: examples/cispo_trainer/run_cispo_qwen2_5_0_5b_gsm8k.sh
def test_verl_cispo_is_two_sided(low):
    compare(ours(cispo_loss, "token_mean", clip_low=low, clip_high=0.3), verl("cispo", "token-mean", low))


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_verl_kl(kind):
    """Lines 1879-1896: only k3 is clamped, its log-ratio at 20 and its value at 10; the numbers reach both bounds."""
    far = REF + torch.where(rand(B, G, R, seed=5) > 0.8, 4.0, 0.0) + torch.where(rand(B, G, R, seed=6) > 1.5, 30.0, 0.0)

    def theirs(new):
        if kind == "k2":
            return verl_aggregate((new - far).square().flatten(0, 1) / 2, "token-mean")
        d = (far - new).clamp(-20, 20)
        return verl_aggregate((d.exp() - d - 1).clamp(-10, 10).flatten(0, 1), "token-mean")

    clamps = {"value_clamp": 10.0} if kind == "k3" else {"log_ratio_clamp": float("inf")}
    weights = token_weights(MASK, "token_mean", **TOTALS)
    compare(lambda new: (kl_estimate(new, far, kind, **clamps) * weights).sum(), theirs)
    d = (far - NEW)[MASK]
    assert (d > 20).any() and ((d.exp() - d - 1 > 10) & (d < 20)).any() and (d.exp() - d - 1 < 10).any()


def test_verl_advantages():
    """Lines 303-328: std + 1e-6, ddof 1; norm_adv_by_std_in_grpo = False is Dr. GRPO."""
    rewards = rand(B, G, seed=7)
    for b in range(B):
        mean, std = rewards[b].mean(), rewards[b].std()
        assert torch.allclose(group_advantages(rewards)[b], ((rewards[b] - mean) / (std + 1e-6)).float(), atol=1e-6)
        assert torch.allclose(group_advantages(rewards, scale="none")[b], (rewards[b] - mean).float(), atol=1e-6)


# --- weights against the sampler, in both -----------------------------------------------------------------------------

SAMPLER = OLD + rand(B, G, R, seed=8)
"""Log-probabilities of a sampler that differs far from OLD: of both modes some weights are cut and some are not."""


def corrected(function, aggregation, mode, cap, **bounds):
    """Our loss with weights against the sampler; OLD is the rollout policy by the training engine."""

    def loss(new):
        weights = sampler_correction(OLD, SAMPLER, MASK, mode, cap).weights * token_weights(MASK, aggregation, **TOTALS)
        return (function(new, OLD, ADVANTAGES, MASK, **bounds).loss * weights).sum()

    return loss


def trl_ratio(mode, clip_max):
    """Lines 2580-2619 without a lower bound: [B * G, T] of tokens, [B * G, 1] of sequences."""
    difference = (OLD - SAMPLER).flatten(0, 1) * FLAT
    if mode == "token_truncate":
        return difference.exp().clamp(max=clip_max)
    ratio = difference.sum(-1, keepdim=True).exp()
    return torch.where(ratio > clip_max, 0.0, ratio)


@pytest.mark.parametrize("cap", [2.0, 3.0])  # ours and verl's default, TRL's
@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
@pytest.mark.parametrize("loss_type, aggregation", [("grpo", "sequence_mean"), ("dapo", "token_mean")])
def test_trl_weights_against_the_sampler(loss_type, aggregation, mode, cap):
    """Line 3117: the surrogate of each token times its ratio, before the sums; the denominators stay."""
    ratio = trl_ratio(mode, cap)

    def theirs(new):
        logp, old, A = new.flatten(0, 1), OLD.flatten(0, 1), ADVANTAGES.flatten()[:, None]
        weight = (logp - old).exp()
        summed = (torch.maximum(-weight * A, -weight.clamp(0.8, 1.3) * A) * ratio * FLAT).sum(1)
        return (summed / FLAT.sum(1)).mean() if loss_type == "grpo" else summed.sum() / FLAT.sum()

    compare(corrected(grpo_loss, aggregation, mode, cap, clip_low=0.2, clip_high=0.3), theirs)
    cut = ratio == (cap if mode == "token_truncate" else 0.0)
    counted = cut[FLAT.bool()] if mode == "token_truncate" else cut
    assert counted.any() and not counted.all()


def verl_weights(mode, cap):
    """Lines 529-566: weights of tokens or of sequences, cut at the cap. Lines 222 and 282-300: `seq_sum_k1` keeps a
    response whose sum of -log ratios is at least log(1 / cap)."""
    difference = (OLD - SAMPLER).flatten(0, 1)
    if mode == "token_truncate":
        return (difference.clamp(-20.0, 20.0).exp() * FLAT).clamp(max=cap)
    total = (difference * FLAT).sum(-1, keepdim=True)
    kept = (-difference.clamp(-20.0, 20.0) * FLAT).sum(-1, keepdim=True) >= -torch.tensor(cap).log()
    return (total.clamp(-20.0, 20.0).exp().expand_as(FLAT) * FLAT).clamp(max=cap) * kept


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
@pytest.mark.parametrize("policy", ["vanilla", "gspo", "cispo"])
def test_verl_weights_against_the_sampler(policy, mode):
    """A response that `seq_sum_k1` rejects leaves verl's denominators too. Here, as in TRL, it stays in them, and so it
    does in this comparison."""
    function = {"vanilla": grpo_loss, "gspo": gspo_loss, "cispo": cispo_loss}[policy]
    bounds = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0 if policy == "vanilla" else 0.0}
    weights = verl_weights(mode, 2.0)

    compare(corrected(function, "token_mean", mode, 2.0, **bounds), verl(policy, "token-mean", weights=weights))
    ours = sampler_correction(OLD, SAMPLER, MASK, mode, 2.0).weights * MASK
    assert torch.allclose(ours.flatten(0, 1), weights, rtol=1e-12, atol=0)
    cut = ours[MASK] == (2.0 if mode == "token_truncate" else 0.0)
    assert cut.any() and not cut.all()
