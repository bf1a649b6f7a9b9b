"""Gradient of one optimizer step: coefficient of the attention term, and ratios of gradients."""

from dataclasses import replace
from typing import Optional, Sequence

from torch import Tensor

from megatron_ral.engine.policy import PolicyEngine
from megatron_ral.engine.settings import schedule_factor
from megatron_ral.objectives.attention import AttentionTerm
from megatron_ral.objectives.base import Objective, finish_metrics
from megatron_ral.types import RlBatch

RATIO_TAGS = {"attention": "attention/grad_ratio", "distill_attention": "distill/attention_grad_ratio"}
"""Term -> tag of |gradient of the term| / |gradient of all other terms|."""


def accumulate_gradients(
    policy: PolicyEngine,
    minibatch: Sequence[RlBatch],
    objective: Objective,
    num_optimizer_steps: int,
    measure_ratio: bool,
) -> dict[str, float]:
    """Form the gradient of one optimizer step, ready for `policy.step`.

    The coefficient of the attention term follows its schedule, or is chosen for the wanted ratio of gradients.

    Args:
        policy: Policy.
        minibatch: Micro-batches of this rank.
        objective: Loss, usually with an attention term.
        num_optimizer_steps: Optimizer steps of the whole run.
        measure_ratio: Whether to measure the ratios of `RATIO_TAGS`.

    Returns:
        Metrics, the same on every rank.
    """
    term: Optional[AttentionTerm] = objective.term("attention")
    if term is None:
        return finish_metrics(policy.forward_backward(minibatch, objective))
    settings = term.settings
    if settings.attention_grad_ratio > 0:
        attention = objective.only("attention").with_term(replace(term, coefficient=1.0))
        attention_sums = policy.forward_backward(minibatch, attention)
        attention_shards = policy.gradient_shards()
        sums = policy.forward_backward(minibatch, objective.without("attention"))
        token_shards = policy.gradient_shards()
        attention_norm, token_norm = policy.gradient_norm(attention_shards), policy.gradient_norm(token_shards)
        # Where no row differs from its target by more than rounding, a ratio would make a signal of the rounding.
        has_signal = attention_norm > 0 and float(attention_sums["attention/above_floor:sum"]) > 0
        coef = settings.attention_grad_ratio * token_norm / attention_norm if has_signal else 0.0
        policy.set_gradient_shards(
            [token.add_(part, alpha=coef) for token, part in zip(token_shards, attention_shards)]
        )
        attention_sums["loss/attention"] *= coef
        metrics = {**finish_metrics({**attention_sums, **sums}), "attention/coef": coef}
        return {**metrics, RATIO_TAGS["attention"]: settings.attention_grad_ratio} if coef > 0 else metrics
    coef = settings.attention_coef * schedule_factor(
        policy.num_steps_taken,
        num_optimizer_steps,
        settings.attention_coef_warmup_steps,
        settings.attention_coef_decay,
    )
    objective = objective.with_term(replace(term, coefficient=coef))
    shards = {}
    for measured in objective.terms:
        if measure_ratio and measured.name in RATIO_TAGS and measured.is_active:
            policy.forward_backward(minibatch, objective.only(measured.name))
            shards[measured.name] = policy.gradient_shards()
    metrics = {**finish_metrics(policy.forward_backward(minibatch, objective)), "attention/coef": coef}
    for name, part in shards.items():
        metrics[RATIO_TAGS[name]] = gradient_ratio(policy, part)
    return metrics


def gradient_ratio(policy: PolicyEngine, term_shards: Sequence[Tensor]) -> float:
    """Return |gradient of a term| / |gradient of the rest| from the term's gradient and the whole gradient held now."""
    rest_shards = [whole - part for whole, part in zip(policy.gradient_shards(), term_shards)]
    rest_norm = policy.gradient_norm(rest_shards)
    return policy.gradient_norm(term_shards) / rest_norm if rest_norm > 0 else 0.0
