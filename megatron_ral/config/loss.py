"""Settings of the objective and of the optimizer that follows it."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt
from pydantic.dataclasses import dataclass

from megatron_ral.config.fields import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, STRICT


@dataclass(frozen=True, config=STRICT)
class LossConfig:
    """policy_coef * policy loss + kl_coef * KL - entropy_coef * entropy on tokens, + attention_coef * attention term
    (+ what section `distill` adds where there is a teacher).

    Of the GRPO family: DAPO (without refill and length penalty) is clip_high = 0.28, kl_coef = 0, filter_equal_rewards;
    Dr. GRPO is aggregation = sequence_sum_norm, advantage_scale = none, kl_coef = 0; GSPO is policy_loss = gspo,
    aggregation = sequence_mean, clip_low = 3e-4, clip_high = 4e-4, kl_coef = 0.
    """

    policy_coef: NonNegativeFloat = 1.0
    """Weight of the policy loss. 0: rewards are only measured (distillation alone)."""
    policy_loss: Literal["grpo", "gspo", "cispo"] = "grpo"
    """grpo: the ratio of each token, clipped. gspo: the ratio of the whole response, clipped. cispo: the clipped ratio
    of each token as a constant weight of its log-likelihood, so that no token loses its gradient."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum_norm"] = "token_mean"
    """How tokens are weighted, over the whole optimizer step: each alike (DAPO); each response alike (GRPO as
    published); a sum over rollout.max_response_length per response (Dr. GRPO). The attention term has `attention_normalizer`
    in its place."""
    advantage_scale: Literal["std", "none"] = "std"
    """Whether advantages are divided by the standard deviation of their group (none: Dr. GRPO)."""
    clip_low: PositiveFloat = 0.2
    """Ratios are clipped below 1 - clip_low. 1 or more: not at all (cispo in its paper)."""
    clip_high: PositiveFloat = 0.2
    """Ratios are clipped above 1 + clip_high. TRL's cispo gives the bound itself: 5 there is 4 here."""
    dual_clip: NonNegativeFloat = 0.0
    """Upper bound of the ratio where the advantage is negative, more than 1 (verl: 3); 0: none. Not with cispo."""
    kl_coef: NonNegativeFloat = 0.04
    """Weight of the KL divergence to the frozen reference; 0: none, and no reference is held (but
    for target `reference`)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """k3: never negative, unbiased in value. k2: unbiased in gradient. k1: measures, but its expected gradient is 0."""
    kl_clamp: NonNegativeFloat = 0.0
    """Bound of the estimate of one token (verl: 10), beyond which it gives no gradient; 0: none."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy of the tokens' distributions, as a bonus."""
    filter_equal_rewards: bool = False
    """Leave groups whose rewards are all equal out of every term and every denominator (the condition of DAPO's dynamic
    sampling). They are dropped and *not* refilled: an optimizer step then has fewer groups, and one without any group
    left has no gradient. Without it such groups have no advantage but count in the means, the KL and the entropy."""
    attention_coef: NonNegativeFloat = 1.0
    """lambda_attn of the paper (0.5, 1 or 5 there). 0: GRPO, the term is only measured."""
    attention_coef_warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the coefficient rises from 0."""
    attention_coef_decay: Literal["constant", "linear", "cosine"] = "constant"
    """How it falls to 0 over the rest of the run."""
    attention_grad_ratio: NonNegativeFloat = 0.0
    """More than 0: in place of attention_coef, choose the coefficient of every optimizer step so that |gradient of the
    attention term| / |gradient of the token terms| is this. Costs one more forward and
    backward pass over the samples of every optimizer step, and one more reduction of gradients."""
    attention_target: Literal["old", "reference", "ema", "group", "hindsight", "oracle"] = "old"
    """The distribution the divergence is taken to; see "Settings" in README.md."""
    attention_ema_decay: Annotated[float, Gt(0), Lt(1)] = 0.99
    """Target `ema`: share of the average that is kept at each rollout."""
    attention_layers: tuple[int, ...] = (-1,)
    """Recorded layers, 0-based; negative counts from the last. Any layer on any pipeline stage; the term is their
    mean."""
    attention_row: Literal["token", "predictor"] = "token"
    """Row of the response token itself (the paper) or of the place before it, which predicts it."""
    attention_exclude_self: bool = True
    """Leave the row's own token out of its policy (the paper: keys before the token)."""
    attention_keys: Literal["all", "visual", "prompt"] = "all"
    """Keys the policy is renormalised over: all before the token (the paper), the visual tokens, or the prompt."""
    attention_divergence: Literal["jsd", "forward_kl", "reverse_kl"] = "jsd"
    """jsd: the paper. forward_kl: KL(target || policy). reverse_kl: KL(policy || target)."""
    attention_normalizer: Literal["token_mean", "sequence_sum"] = "token_mean"
    """Sum over rows divided by the response tokens, or by the responses, of the whole optimizer step."""
    attention_row_cap: NonNegativeFloat = 0.0
    """Divergence of a row beyond which it gives no gradient; 0: none."""
    attention_negative_weight: NonNegativeFloat = 1.0
    """Factor of rows with a negative advantage, which are pushed away from their target in no particular direction."""
    attention_advantages: Literal["own", "shuffled"] = "own"
    """shuffled: a control, in which the attention term gets the advantages of each group in a random order."""
    attention_store: Literal["rows", "qk"] = "rows"
    """What is kept of the target's pass until the update: its rows in float32 (4 bytes x rows x keys), or its queries and
    keys, from which the same code forms them again (less memory for long sequences)."""


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """AdamW with linear warm-up."""

    learning_rate: PositiveFloat = 1.0e-5
    """After the warm-up."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1.0e-8
    """Added to the square root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled from the gradient."""
    clip_grad_norm: NonNegativeFloat = 1.0
    """Global norm over all parameters of all stages; 0: no clipping."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls over the optimizer steps after the warm-up."""
    min_learning_rate_ratio: Fraction = 0.0
    """Where the decay ends, as a share of `learning_rate`."""
