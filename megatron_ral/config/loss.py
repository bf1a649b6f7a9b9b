"""Settings of the objective and of the optimizer that follows it."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic.dataclasses import dataclass

from megatron_ral.config.fields import (
    STRICT,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    TargetName,
)


@dataclass(frozen=True, config=STRICT)
class LossConfig:
    """policy_coef * policy loss + kl_coef * KL - entropy_coef * entropy over tokens, + attention_coef * attention term
    (+ the terms of section `distill` where there is a teacher).

    Known methods as settings: DAPO (without length penalty; its refill is rollout.refill_rounds) is clip_high = 0.28,
    kl_coef = 0, filter_equal_rewards; Dr. GRPO is aggregation = sequence_sum_norm, advantage_scale = none, kl_coef = 0;
    GSPO is policy_loss = gspo, aggregation = sequence_mean, clip_low = 3e-4, clip_high = 4e-4, kl_coef = 0.
    """

    policy_coef: NonNegativeFloat = 1.0
    """Weight of the policy loss. 0 logs rewards without training on them (distillation alone)."""
    policy_loss: Literal["grpo", "gspo", "cispo"] = "grpo"
    """Surrogate of the policy gradient. grpo: clipped ratio of each token. gspo: clipped ratio of the whole response.
    cispo: clipped ratio of each token as a constant weight of its log-likelihood, so that no token loses its
    gradient."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum_norm"] = "token_mean"
    """Weights of tokens within the optimizer step. token_mean: every token alike (DAPO). sequence_mean: every response
    alike (GRPO as published). sequence_sum_norm: sum over tokens / rollout.max_response_length, mean over responses
    (Dr. GRPO). The attention term uses `attention_normalizer` instead."""
    advantage_scale: Literal["std", "none"] = "std"
    """Divisor of the advantages: the standard deviation of rewards in the group, or none (Dr. GRPO)."""
    clip_low: PositiveFloat = 0.2
    """Distance of the lower clipping bound from 1: ratios are clipped below 1 - clip_low. 1 or more never clips (cispo
    in its paper)."""
    clip_high: PositiveFloat = 0.2
    """Distance of the upper clipping bound from 1: ratios are clipped above 1 + clip_high. TRL's cispo gives the bound
    itself, so that 5 there is 4 here."""
    dual_clip: NonNegativeFloat = 0.0
    """Upper bound of the ratio where the advantage is negative, above 1 (verl: 3); 0 for none. Not possible with
    cispo."""
    sampler_correction: Literal["none", "token_truncate", "sequence_mask"] = "none"
    """Importance weight of the policy loss against the sampler, p_old / mu, where p_old is the rollout policy by the
    training engine and mu the sampler. token_truncate: the ratio of each token, at most the cap. sequence_mask: the
    ratio of the whole response, 0 above the cap. Without gradient; KL, entropy and attention terms stay as they are.
    With rollout.overlap the default is token_truncate."""
    sampler_correction_cap: Annotated[float, Gt(1), Le(1e6)] = 2.0
    """Bound on the weight of `sampler_correction`. It is above 1, because equal samplers have the ratio 1 up to
    rounding."""
    kl_coef: NonNegativeFloat = 0.04
    """Weight of the KL divergence from the frozen reference model. With 0 no reference is held, unless target
    `reference` needs it."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """Estimator of the KL divergence from sampled tokens. k3: never negative, unbiased in value. k2: unbiased in
    gradient."""
    kl_clamp: NonNegativeFloat = 0.0
    """Estimate of one token above which it gives no gradient (verl: 10); 0 for none."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy of the token distributions, as a bonus."""
    filter_equal_rewards: bool = False
    """Exclusion of groups with equal rewards from every term and denominator (the condition of DAPO's dynamic
    sampling). Such groups are dropped and not refilled by this setting (`rollout.refill_rounds` does that), so that an
    optimizer step has fewer groups, and no gradient when none is left. With false they have zero advantage but count in
    the means, the KL divergence and the entropy."""
    attention_coef: NonNegativeFloat = 1.0
    """Weight of the attention term (lambda_attn in the paper: 0.5, 1 or 5). 0 is GRPO, with the term only logged."""
    attention_coef_warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which `attention_coef` rises from 0."""
    attention_coef_decay: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule by which `attention_coef` falls to 0 after its warm-up."""
    attention_grad_ratio: NonNegativeFloat = 0.0
    """Wanted ratio |gradient of the attention term| / |gradient of the token terms|; 0 for none. Above 0 it replaces
    `attention_coef`: the weight of every optimizer step is chosen to reach it, at the cost of one more forward and
    backward pass and one more reduction of gradients per step."""
    attention_target: TargetName = "old"
    """Target distribution of the attention divergence (`old` in the paper); docs/method.md describes each."""
    attention_layers: tuple[int, ...] = (-1,)
    """Layers whose attention is recorded, 0-based, negative from the last, on any pipeline stage. The term is the mean
    over them."""
    attention_row: Literal["token", "predictor"] = "token"
    """Query position of a response token: the token itself (the paper), or the position before it, which predicts
    it."""
    attention_rows: Literal["all", "deciding", "visual"] = "all"
    """Weights of the rows of a response. all: alike (the paper). deciding: the row that predicts the first token of the
    answer, and no other. visual: by their attention to the picture."""
    attention_exclude_self: bool = True
    """Exclusion of the query's own token from its attention distribution (the paper: keys before the token)."""
    attention_keys: Literal["all", "visual", "prompt"] = "all"
    """Keys over which attention is renormalised: all before the token (the paper), the visual tokens, or the prompt."""
    attention_divergence: Literal["jsd", "forward_kl", "reverse_kl"] = "jsd"
    """Divergence between target and current attention. jsd: the paper. forward_kl: KL(target || current). reverse_kl:
    KL(current || target). Target `contrast` is a cross-entropy and has none of them."""
    attention_normalizer: Literal["token_mean", "sequence_sum"] = "token_mean"
    """Denominator of the sum over rows: the response tokens, or the responses, of the whole optimizer step. With
    attention_rows = deciding each response has one row, so that it is the responses in both cases."""
    attention_row_cap: NonNegativeFloat = 0.0
    """Divergence of a row above which it gives no gradient; 0 for none."""
    attention_negative_weight: NonNegativeFloat = 1.0
    """Factor of rows with a negative advantage, which are pushed away from their target in no particular direction."""
    attention_advantages: Literal["own", "shuffled"] = "own"
    """Weights of the responses in the attention term: advantages, or what the target makes of them. shuffled: a control
    in which each group's are permuted at random."""
    attention_store: Literal["rows", "qk"] = "rows"
    """Form in which the target's pass is stored until the update: its rows in float32 (4 bytes x rows x keys), or its
    queries and keys, from which the same code computes the rows again (less memory for long sequences)."""


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """AdamW with linear warm-up."""

    learning_rate: PositiveFloat = 1.0e-5
    """Learning rate after the warm-up."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay rate of the first moment."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    """Decay rate of the second moment."""
    eps: PositiveFloat = 1.0e-8
    """Constant added to the square root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay, decoupled from the gradient."""
    clip_grad_norm: NonNegativeFloat = 1.0
    """Maximum global gradient norm over all parameters of all stages; 0 for no clipping."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rate after the warm-up."""
    min_learning_rate_ratio: Fraction = 0.0
    """Final learning rate of the schedule as a share of `learning_rate`."""
