"""Token losses of the GRPO family, KL estimators and weights: numbers by hand, slow loops, finite differences, signs.

No loss depends on padding, on the order of responses, or on how a batch is split into micro-batches.
"""

import math

import pytest
import torch

from megatron_ral.functional.aggregation import token_weights
from megatron_ral.functional.kl import kl_estimate
from megatron_ral.functional.surrogates import SURROGATES, cispo_loss, grpo_loss, gspo_loss

B, G, R = 2, 3, 5
LENGTHS = torch.tensor([[5, 2, 3], [1, 4, 2]])
MASK = torch.arange(R) < LENGTHS[..., None]
ADVANTAGES = torch.tensor([[1.2, -0.7, 0.5], [-1.1, 0.4, -0.9]], dtype=torch.float64)
LIMIT = 9  # of the generation; no response reaches it
MODES = ("token_mean", "sequence_mean", "sequence_sum_norm")
# Bounds that clip some and not all of the ratios below.
BOUNDS = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 1.6},
    "gspo": {"clip_low": 0.1, "clip_high": 0.15},
    "cispo": {"clip_low": 0.2, "clip_high": 0.3},
}


def rand(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def logprobs(seed=1):
    return 0.5 * rand(B, G, R, seed=seed) - 2


def whole_loss(kind, new, old, advantages=ADVANTAGES, mask=MASK, mode="token_mean", totals=None, **bounds):
    """Return the weighted sum of one of the losses; the totals are those of the whole batch unless given."""
    if totals is None:
        totals = {"num_tokens": int(mask.sum()), "num_sequences": mask[..., 0].numel(), "max_response_length": LIMIT}
    loss = SURROGATES[kind](new, old, advantages, mask, **{**BOUNDS[kind], **bounds}).loss
    return (loss * token_weights(mask, mode, **totals)).sum()


# --- by hand ----------------------------------------------------------------------------------------------------------


def by_hand(function, ratios, advantages, **bounds):
    """Return (loss, gradient, clipped_low, clipped_high) of one token per response with old log-probability -1."""
    new = (torch.log(torch.tensor(ratios, dtype=torch.float64)) - 1).view(1, -1, 1).requires_grad_()
    mask = torch.ones_like(new, dtype=torch.bool)
    result = function(new, torch.full_like(new, -1.0), torch.tensor([advantages]).double(), mask, **bounds)
    (gradient,) = torch.autograd.grad(result.loss.sum(), new)
    assert not result.ratio.requires_grad
    assert result.ratio.flatten().tolist() == pytest.approx(ratios)
    return [tensor.flatten().tolist() for tensor in (result.loss, gradient, result.clipped_low, result.clipped_high)]


@pytest.mark.parametrize("function", [grpo_loss, gspo_loss])  # one token: the sequence is the token
def test_clipped_surrogate_by_hand(function):
    loss, gradient, low, high = by_hand(
        function, [1.5, 1.5, 0.5, 0.5, 1.1], [1.0, -1.0, 1.0, -1.0, -2.0], clip_low=0.2, clip_high=0.3
    )
    assert loss == pytest.approx([-1.3, 1.5, -0.5, 0.8, 2.2])
    assert gradient == pytest.approx([0.0, 1.5, -0.5, 0.0, 2.2])
    assert high == [True, False, False, False, False] and low == [False, False, False, True, False]


def test_dual_clip_by_hand():
    """The dual clip bounds the loss from above, and only where A < 0."""
    loss, gradient, low, high = by_hand(
        grpo_loss, [5.0, 2.0, 5.0, 0.5], [-2.0, -2.0, 2.0, -2.0], clip_low=0.2, clip_high=0.3, dual_clip=3.0
    )
    assert loss == pytest.approx([6.0, 4.0, -2.6, 1.6])
    assert gradient == pytest.approx([0.0, 4.0, 0.0, 0.0])
    assert high == [True, False, True, False] and low == [False, False, False, True]
    for wrong in (0.5, 1.0):
        with pytest.raises(ValueError, match="dual_clip"):
            by_hand(grpo_loss, [1.0], [1.0], clip_low=0.2, clip_high=0.3, dual_clip=wrong)


def test_gspo_by_hand():
    """Log-ratios 0.3, 0.1, -0.1 of a response give s = exp(0.1) at each of its tokens; padding has no influence."""
    new = torch.tensor([[[0.3, 0.1, -0.1, 7.0]]], dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[[True, True, True, False]]])
    s = math.exp(0.1)
    for advantage, clip_high, factor, value in ((2.0, 0.2, s, -2 * s), (2.0, 0.05, 0.0, -2.1), (-2.0, 0.05, -s, 2 * s)):
        result = gspo_loss(
            new, torch.zeros_like(new), torch.tensor([[advantage]]).double(), mask, clip_low=0.1, clip_high=clip_high
        )
        (gradient,) = torch.autograd.grad((result.loss * mask).sum() / 3, new)
        assert result.loss[mask].tolist() == pytest.approx([value] * 3)
        assert result.ratio.flatten().tolist() == pytest.approx([s, s, s, 1.0])
        assert gradient.flatten().tolist() == pytest.approx([-2 * factor / 3] * 3 + [0.0])
        assert result.clipped_high.flatten().tolist() == [factor == 0.0] * 3 + [False]


def test_cispo_by_hand():
    """The loss is -weight A logp, and a clipped token keeps its gradient. clip_low >= 1 gives the one-sided form."""
    logp = [math.log(ratio) - 1 for ratio in (1.5, 1.5, 0.5, 1.1, 0.75)]
    loss, gradient, low, high = by_hand(
        cispo_loss, [1.5, 1.5, 0.5, 1.1, 0.75], [1.0, -1.0, 2.0, 1.0, -1.0], clip_low=0.2, clip_high=0.3
    )
    assert loss == pytest.approx([-1.3 * logp[0], 1.3 * logp[1], -1.6 * logp[2], -1.1 * logp[3], 0.8 * logp[4]])
    assert gradient == pytest.approx([-1.3, 1.3, -1.6, -1.1, 0.8])
    assert low == [False, False, True, False, True] and high == [True, True, False, False, False]
    _, gradient, low, high = by_hand(cispo_loss, [1e-4, 9.0, 3.0], [1.0, 1.0, -1.0], clip_low=1.0, clip_high=4.0)
    assert gradient == pytest.approx([-1e-4, -5.0, 3.0])
    assert low == [False] * 3 and high == [False, True, False]
    with pytest.raises(ValueError, match="dual_clip = 3.0 has no meaning for CISPO"):
        by_hand(cispo_loss, [1.0], [1.0], clip_low=0.2, clip_high=0.3, dual_clip=3.0)


def test_weights_by_hand():
    totals = {"num_tokens": 20, "num_sequences": 8, "max_response_length": 10}
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[0, 0, 0], [0, 0, 0]]]).bool()  # the second group takes no part
    for mode, values in (
        ("token_mean", [1 / 20] * 3),
        ("sequence_mean", [1 / 16, 1 / 16, 1 / 8]),
        ("sequence_sum_norm", [1 / 80] * 3),
    ):
        weights = token_weights(mask, mode, **totals)
        assert weights[mask].tolist() == pytest.approx(values, rel=1e-15) and weights.dtype == torch.float64
        assert not weights[~mask].any()
    with pytest.raises(ValueError, match="mean_token"):
        token_weights(mask, "mean_token", **totals)


@pytest.mark.parametrize(
    "kind, values, gradients",
    [
        ("k2", [0.0, 0.5, 0.5], [0.0, 1.0, -1.0]),
        ("k3", [0.0, math.exp(-1), math.e - 2], [0.0, 1 - math.exp(-1), 1 - math.e]),
    ],
)
def test_kl_by_hand(kind, values, gradients):
    new = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64).requires_grad_()
    value = kl_estimate(new, torch.tensor([-1.0, -2.0, 0.0]).double(), kind)
    assert value.tolist() == pytest.approx(values, abs=1e-15)
    assert torch.autograd.grad(value.sum(), new)[0].tolist() == pytest.approx(gradients, abs=1e-15)


def test_kl_clamps():
    new = torch.tensor([-1.0, -60.0, -4.0], dtype=torch.float64).requires_grad_()
    ref = torch.tensor([-60.0, -1.0, -1.0]).double()
    wanted = {
        "k2": [200.0, 200.0, 4.5],
        "k3": [math.exp(-20) + 19, math.exp(20) - 21, math.exp(3) - 4],
    }
    for kind, values in wanted.items():
        assert kl_estimate(new, ref, kind).tolist() == pytest.approx(values)
        value = kl_estimate(new, ref, kind, value_clamp=10.0)
        assert value.tolist() == pytest.approx([max(min(number, 10.0), -10.0) for number in values])
        (gradient,) = torch.autograd.grad(value.sum(), new)
        assert not gradient[:2].any() and bool(gradient[2]) == (abs(values[2]) < 10)
    for unknown in ("k1", "k4"):
        with pytest.raises(ValueError, match=unknown):
            kl_estimate(new, ref, unknown)


def test_expectations_of_kl_estimators():
    """Expected values and gradients, exact over a categorical distribution, are those of the docstring."""
    logits, ref = rand(6, seed=1).requires_grad_(), torch.log_softmax(rand(6, seed=2), -1)
    policy = torch.log_softmax(logits, -1)
    reverse, forward = (policy.exp() * (policy - ref)).sum(), (ref.exp() * (ref - policy)).sum()
    wanted = {
        "k2": torch.autograd.grad(reverse, logits, retain_graph=True)[0],
        "k3": torch.autograd.grad(forward, logits, retain_graph=True)[0],
    }
    for kind, gradient in wanted.items():
        value = (policy.detach().exp() * kl_estimate(policy, ref, kind)).sum()  # tokens drawn from the policy
        assert torch.allclose(torch.autograd.grad(value, logits, retain_graph=True)[0], gradient, atol=1e-14), kind
        assert (kind == "k2") or float(value) == pytest.approx(float(reverse), rel=1e-12)


# --- slow reference, finite differences -------------------------------------------------------------------------------


def clip(value, low, high):
    return min(max(value, low), high)


def slow_loss(kind, new, old, mode, clip_low, clip_high, dual_clip=0.0):
    """Return (value, gradient by hand), computed token by token in Python floats."""
    total, gradient = 0.0, torch.zeros(B, G, R, dtype=torch.float64)
    for b in range(B):
        for g in range(G):
            length, A = int(LENGTHS[b, g]), float(ADVANTAGES[b, g])
            weight = {
                "token_mean": 1 / int(LENGTHS.sum()),
                "sequence_mean": 1 / (B * G * length),
                "sequence_sum_norm": 1 / (B * G * LIMIT),
            }[mode]
            differences = [float(new[b, g, r] - old[b, g, r]) for r in range(length)]
            for r in range(length):
                ratio = math.exp(sum(differences) / length if kind == "gspo" else differences[r])
                clipped = clip(ratio, 1 - clip_low, 1 + clip_high)
                if kind == "cispo":
                    value, slope = -clipped * A * float(new[b, g, r]), -clipped * A
                else:
                    value = max(-ratio * A, -clipped * A)
                    if A < 0 and dual_clip:
                        value = min(value, -dual_clip * A)
                    slope = -ratio * A if value == -ratio * A else 0.0
                total += weight * value
                gradient[b, g, r] = weight * slope
    return total, gradient


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", SURROGATES)
def test_value_and_gradient_equal_a_slow_loop(kind, mode):
    new, old = logprobs(1).requires_grad_(), logprobs(2)
    value = whole_loss(kind, new, old, mode=mode)
    wanted, gradient = slow_loss(kind, new.detach(), old, mode, **BOUNDS[kind])
    assert float(value) == pytest.approx(wanted, rel=1e-12)
    (ours,) = torch.autograd.grad(value, new)
    assert torch.allclose(ours, gradient, rtol=1e-12, atol=1e-16)
    flags = SURROGATES[kind](new, old, ADVANTAGES, MASK, **BOUNDS[kind])
    for acted in (flags.clipped_low, flags.clipped_high):
        assert 0 < acted.sum() < MASK.sum(), "the comparison must see clipped and unclipped tokens"
    if kind != "cispo":
        assert torch.equal((gradient == 0) & MASK, flags.clipped_low | flags.clipped_high)


def test_gradcheck():
    """Gradients equal finite differences.

    GSPO is summed per response, because its token form moves the gradient between tokens of one response. CISPO is
    evaluated where its weight is the constant bound.
    """
    new, old = logprobs(1), logprobs(2)
    assert torch.autograd.gradcheck(
        lambda x: grpo_loss(x, old, ADVANTAGES, MASK, **BOUNDS["grpo"]).loss, (new.clone().requires_grad_(),)
    )
    assert torch.autograd.gradcheck(
        lambda x: (gspo_loss(x, old, ADVANTAGES, MASK, **BOUNDS["gspo"]).loss * MASK).sum(-1),
        (new.clone().requires_grad_(),),
    )
    above = old + 1 + new.abs()
    assert torch.autograd.gradcheck(
        lambda x: cispo_loss(x, old, ADVANTAGES, MASK, **BOUNDS["cispo"]).loss, (above.requires_grad_(),)
    )
    for kind in ("k2", "k3"):
        assert torch.autograd.gradcheck(lambda x, kind=kind: kl_estimate(x, old, kind), (new.clone().requires_grad_(),))


@pytest.mark.parametrize("mode", MODES)
def test_gspo_is_the_sequence_objective(mode):
    """The sum over responses of W_i * -min(s_i A_i, clip(s_i) A_i), differentiated through s_i with weights W_i."""
    new, old = logprobs(1).requires_grad_(), logprobs(2)
    s = (((new - old) * MASK).sum(-1) / LENGTHS).exp()
    per_response = -torch.minimum(s * ADVANTAGES, s.clamp(0.9, 1.15) * ADVANTAGES)
    lengths = LENGTHS.double()
    share = {
        "token_mean": lengths / lengths.sum(),
        "sequence_mean": torch.ones_like(lengths) / (B * G),
        "sequence_sum_norm": lengths / (B * G * LIMIT),
    }[mode]
    wanted, ours = (per_response * share).sum(), whole_loss("gspo", new, old, mode=mode)
    assert float(ours) == pytest.approx(float(wanted), rel=1e-12)
    (gradient,) = torch.autograd.grad(wanted, new)
    assert torch.allclose(torch.autograd.grad(ours, new)[0], gradient, rtol=1e-12, atol=1e-16) and gradient.any()


# --- invariances, and the direction of the gradient ------------------------------------------------------------------


def value_and_gradient(kind, new, *arguments, **settings):
    new = new.clone().requires_grad_()
    value = whole_loss(kind, new, *arguments, **settings)
    return value.detach(), torch.autograd.grad(value, new)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", SURROGATES)
def test_padding_and_order_change_nothing(kind, mode):
    new, old = logprobs(1), logprobs(2)
    value, gradient = value_and_gradient(kind, new, old, mode=mode)
    # three more columns, and in all padding numbers that would overflow a ratio
    wide, wide_old = (torch.cat([tensor, torch.zeros(B, G, 3)], -1) for tensor in (new, old))
    mask = torch.arange(R + 3) < LENGTHS[..., None]
    wide, wide_old = wide.masked_fill(~mask, -1e-3), wide_old.masked_fill(~mask, -1e30)
    ours, ours_gradient = value_and_gradient(kind, wide, wide_old, mask=mask, mode=mode)
    assert torch.allclose(ours, value, rtol=1e-13) and torch.allclose(ours_gradient[..., :R], gradient, rtol=1e-13)
    assert not ours_gradient[~mask].any()
    result = SURROGATES[kind](wide, wide_old, ADVANTAGES, mask, **BOUNDS[kind])
    assert not (result.clipped_low | result.clipped_high)[~mask].any() and (result.ratio[~mask] == 1).all()
    order = torch.tensor([2, 0, 1])
    ours, ours_gradient = value_and_gradient(
        kind, new[:, order], old[:, order], ADVANTAGES[:, order], MASK[:, order], mode=mode
    )
    assert torch.allclose(ours, value, rtol=1e-13) and torch.allclose(ours_gradient, gradient[:, order], rtol=1e-13)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", SURROGATES)
def test_micro_batches_of_a_batch_add_up(kind, mode):
    """One group per micro-batch, each padded to its own longest response; a mean over each would be another loss."""
    new, old = logprobs(1), logprobs(2)
    value, gradient = value_and_gradient(kind, new, old, mode=mode)
    totals = {"num_tokens": int(LENGTHS.sum()), "num_sequences": B * G, "max_response_length": LIMIT}
    total, local = 0.0, 0.0
    for b in range(B):
        width = int(LENGTHS[b].max())
        part_of_batch = [tensor[b : b + 1, :, :width] for tensor in (new, old)]
        part_of_batch += [ADVANTAGES[b : b + 1], MASK[b : b + 1, :, :width]]
        part, part_gradient = value_and_gradient(kind, *part_of_batch, mode=mode, totals=totals)
        total, local = total + part, local + value_and_gradient(kind, *part_of_batch, mode=mode)[0] / B
        assert torch.allclose(part_gradient[0], gradient[b, :, :width], rtol=1e-13, atol=0)
    assert torch.allclose(total, value, rtol=1e-13)
    assert mode != "token_mean" or not torch.allclose(local, value, rtol=1e-3)


@pytest.mark.parametrize("kind", SURROGATES)
def test_gradient_is_the_policy_gradient_on_policy(kind):
    """At ratio 1 every loss has the gradient -A / T: descent makes tokens with A > 0 likelier, others less so."""
    old = logprobs(1)
    _, gradient = value_and_gradient(kind, old, old)
    assert torch.allclose(gradient, -ADVANTAGES[..., None] * MASK / MASK.sum(), rtol=1e-13, atol=0)


def test_log_ratio_clamp_keeps_ratios_finite():
    old = torch.full((1, 1, 1), -300.0, dtype=torch.float32)
    new = torch.zeros_like(old).requires_grad_()
    mask, advantages = torch.ones(1, 1, 1, dtype=torch.bool), torch.tensor([[-1.0]])
    for kind, wanted in (("grpo", math.exp(20)), ("gspo", math.exp(20)), ("cispo", 0.0)):
        result = SURROGATES[kind](new, old, advantages, mask, clip_low=0.2, clip_high=0.2)
        assert float(result.loss) == pytest.approx(wanted, rel=1e-5)
        assert float(result.ratio) == pytest.approx(math.exp(20), rel=1e-5)
        assert float(torch.autograd.grad(result.loss.sum(), new)[0]) == pytest.approx(1.2 if kind == "cispo" else 0.0)
