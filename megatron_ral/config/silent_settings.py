"""Settings that have no effect in the run they stand in, each with its remedy: a user is told before the first step."""

from dataclasses import fields
from typing import Any

from megatron_ral.config import RunConfig


def silent_setting_warnings(config: RunConfig) -> list[str]:
    """One sentence per setting without effect; above all those under which the attention term cannot act."""
    warnings = []
    if config.parallel.sequence_parallel and config.parallel.tensor_model_parallel_size == 1:
        warnings.append("parallel.sequence_parallel has no effect with parallel.tensor_model_parallel_size = 1")
    warnings += _distillation_warnings(config)
    if config.train.algorithm != "ral":
        return warnings
    loss, changed = config.loss, _changed(config.loss)
    if not config.attention_acts and not config.distills:
        warnings.append("loss.attention_coef = 0: the attention term is off and this run is GRPO")
    elif config.attention_acts and loss.attention_target == "old" and config.updates_per_rollout == 1:
        warnings.append(
            "one optimizer step per rollout with loss.attention_target = old: the divergence and its gradient "
            "are exactly zero and this run is GRPO for any attention_coef; raise rollout.num_minibatches or "
            "rollout.num_epochs, or set loss.attention_target = reference"
        )
    by_ratio = ("attention_coef", "attention_coef_warmup_steps", "attention_coef_decay")
    without_sign = ("attention_negative_weight", "attention_advantages")
    unused = {
        "with loss.attention_grad_ratio, which chooses the coefficient itself": by_ratio
        if loss.attention_grad_ratio
        else (),
        f"with loss.attention_target = {loss.attention_target}, whose rows have no negative weight": {
            "oracle": without_sign,
            "hindsight": without_sign[:1],
        }.get(loss.attention_target, ()),
        f"with loss.attention_target = {loss.attention_target}": ("attention_ema_decay",)
        if loss.attention_target != "ema"
        else (),
        "with loss.attention_keys = visual, of which no row's own token is one": ("attention_exclude_self",)
        if loss.attention_keys == "visual"
        else (),
        "with loss.kl_coef = 0": ("kl_estimator", "kl_clamp") if loss.kl_coef == 0 else (),
    }
    for reason, names in unused.items():
        warnings += [f"loss.{name} = {getattr(loss, name)} has no effect {reason}" for name in names if name in changed]
    if config.model.reference_path and not config.needs_reference:
        warnings.append(
            "model.reference_path has no effect with loss.kl_coef = 0 and loss.attention_target = "
            f"{loss.attention_target}: no reference is held"
        )
    if loss.kl_estimator == "k1" and loss.kl_coef > 0:
        warnings.append("loss.kl_estimator = k1 has an expected gradient of 0; take k2 or k3 to hold the policy back")
    if (
        loss.policy_loss == "gspo"
        and loss.policy_coef > 0
        and (loss.clip_high > 0.01 or loss.aggregation != "sequence_mean")
    ):
        warnings.append(
            "loss.policy_loss = gspo: ratios of whole responses move little, its paper has clip_low = 3.0e-4, "
            "clip_high = 4.0e-4 and aggregation = sequence_mean"
        )
    return warnings


def _distillation_warnings(config: RunConfig) -> list[str]:
    settings, loss, warnings = config.distill, config.loss, []
    changed = _changed(settings)
    if not config.distills:
        why = "with train.algorithm = sft" if config.train.algorithm != "ral" else "without teacher.path"
        warnings += [f"distill.{name} has no effect {why}" for name in sorted(changed)]
        warnings += [f"teacher.{name} has no effect {why}" for name in sorted(_changed(config.teacher))]
        if config.train.algorithm == "ral" and loss.policy_coef == 0 and not config.attention_acts:
            warnings.append(
                "loss.policy_coef = 0 without teacher.path: rewards give no gradient; set it to 1, or name a teacher"
            )
        return warnings
    if config.teacher.sequence_parallel and config.teacher_layout[0] == 1:
        warnings.append("teacher.sequence_parallel has no effect with one tensor rank of the teacher")
    if settings.token_coef == 0 and settings.attention_coef == 0:
        warnings.append("distill.token_coef = 0 and distill.attention_coef = 0: the teacher is only measured against")
    unused = {
        f"distill.token_divergence = {settings.token_divergence}": {
            "cross_entropy": ("beta", "temperature", "top_tokens"),
            "jsd": (),
        }.get(settings.token_divergence, ("beta",)),
        "distill.attention_keys = visual, of which no row's own token is one": ("attention_exclude_self",)
        if settings.attention_keys == "visual"
        else (),
    }
    for reason, names in unused.items():
        warnings += [
            f"distill.{name} = {getattr(settings, name)} has no effect with {reason}"
            for name in names
            if name in changed
        ]
    if loss.policy_coef == 0:
        names = {"policy_loss", "clip_low", "clip_high", "dual_clip"} & _changed(loss)
        warnings += [f"loss.{name} has no effect with loss.policy_coef = 0" for name in sorted(names)]
    return warnings


def _changed(section: Any) -> set[str]:
    """Names of a section's settings that differ from their default."""
    default = type(section)()
    return {field.name for field in fields(section) if getattr(section, field.name) != getattr(default, field.name)}
