"""Table of the rules about combinations of settings: which are impossible, and which leave a setting without effect.

A rule is a row: its severity, the setting at fault, a condition, and the remedy. An error stops a run before it starts;
a warning is logged, because the run works but a setting in it does nothing, or not what its user may expect. Bounds of
a single setting belong to its type in `sections.py`. The rules of an attention target come from its row in
`attention/targets/registry.py`.
"""

from typing import Iterator, Optional

from megatron_ral.attention.targets.registry import TARGETS, TargetPass, TargetRules
from megatron_ral.config.adapter import PROJECTIONS
from megatron_ral.config.launch_rules import LAUNCH_RULES
from megatron_ral.config.rule import Launch, Rule, Severity, Subject, keys_of, setting, without_effect
from megatron_ral.config.sampler_rules import SAMPLER_RULES
from megatron_ral.config.sections import AttentionNoiseConfig, RunConfig


def _target(config: RunConfig) -> TargetRules:
    return TARGETS[config.loss.attention_target]


def _endless_source(config: RunConfig) -> Optional[int]:
    """Return the index of the first source that is endless although another one follows."""
    return next((index for index, source in enumerate(config.data.train[:-1]) if not source.num_samples), None)


def _has_repeats(values: tuple[object, ...]) -> bool:
    return len(set(values)) != len(values)


def _is_rl(config: RunConfig) -> bool:
    return config.train.algorithm == "ral"


def _corrects(config: RunConfig) -> bool:
    """Say whether the policy loss has weights against the sampler."""
    return _is_rl(config) and config.loss.sampler_correction != "none" and config.loss.policy_coef > 0


def _allowed_keys(config: RunConfig) -> str:
    target = _target(config)
    return (
        f"is not possible with {{loss.attention_target}}, because {target.keys_reason}; "
        f"set {' or '.join(reversed(target.keys))}"
    )


def _target_warnings() -> Iterator[Rule]:
    """Return a warning for each setting that some target does not use."""
    for key in sorted({f"loss.{name}" for rules in TARGETS.values() for name in rules.unused_settings}):
        name = key.removeprefix("loss.")
        yield from without_effect(
            f"loss {name}",
            lambda c, name=name: _is_rl(c) and name in _target(c).unused_settings,
            lambda c, name=name: f"with {{loss.attention_target}}, because {_target(c).unused_settings[name]}",
        )


ERROR, WARNING = Severity.ERROR, Severity.WARNING
_TEACHER_KEYS = (
    "teacher path dtype tensor_model_parallel_size pipeline_model_parallel_size sequence_parallel cpu_offload"
)
_DISTILL_KEYS = keys_of("distill", type(RunConfig().distill))

RULES: tuple[Rule, ...] = (
    # Impossible combinations. The first one that applies is reported.
    Rule(ERROR, "model.path", lambda c: not c.model.path, "is empty; give a model folder", lambda c: None),
    Rule(
        ERROR, "data.train", lambda c: not c.data.train, "is empty; give at least one source of shards", lambda c: None
    ),
    Rule(
        ERROR,
        lambda c: f"data.train.{_endless_source(c)}.num_samples",
        lambda c: _endless_source(c) is not None,
        "(endless) is only possible for the last source; give a number of samples",
    ),
    Rule(
        ERROR,
        "rollout.num_prompts",
        lambda c: _is_rl(c) and c.rollout.num_prompts % c.rollout.num_minibatches > 0,
        "is not divisible by {rollout.num_minibatches}",
    ),
    Rule(
        ERROR,
        "model.train_vision",
        lambda c: _is_rl(c) and c.model.train_vision,
        "is not possible with {train.algorithm}, which computes visual features once per rollout; set it to false",
    ),
    Rule(
        ERROR,
        "model.train_vision",
        lambda c: c.adapter.rank > 0 and c.model.train_vision,
        "is not possible with {adapter.rank}, which trains adapters of the language layers alone; set it to false, or "
        "adapter.rank to 0",
    ),
    Rule(
        ERROR,
        "adapter.dropout",
        lambda c: c.adapter.dropout != 0,
        "is not possible: the log-probabilities of one response would differ from pass to pass; set it to 0",
    ),
    Rule(
        ERROR,
        "adapter.targets",
        lambda c: not c.adapter.targets or _has_repeats(c.adapter.targets),
        lambda c: f"must name at least one of {', '.join(PROJECTIONS)}, and each only once",
    ),
    Rule(
        ERROR,
        "adapter.rank",
        lambda c: c.adapter.rank == 0 and bool(c.adapter.path),
        "means no adapters, but {adapter.path}; set it to the r of adapter_config.json in that folder",
    ),
    Rule(
        ERROR,
        "loss.attention_layers",
        lambda c: not c.loss.attention_layers or _has_repeats(c.loss.attention_layers),
        "must name at least one layer, and each only once",
    ),
    Rule(
        ERROR,
        "loss.attention_target",
        lambda c: c.loss.attention_target not in TARGETS,
        f"is not a known target; choose one of {', '.join(TARGETS)}",
    ),
    Rule(ERROR, "loss.attention_keys", lambda c: c.loss.attention_keys not in _target(c).keys, _allowed_keys),
    Rule(
        ERROR,
        "loss.attention_store",
        lambda c: c.loss.attention_store not in _target(c).stores,
        lambda c: f"is not possible with {{loss.attention_target}}; set {' or '.join(_target(c).stores)}",
    ),
    Rule(
        ERROR,
        "loss.dual_clip",
        lambda c: 0 < c.loss.dual_clip <= 1,
        "must be 0 (off) or more than 1",
    ),
    Rule(
        ERROR,
        "loss.dual_clip",
        lambda c: c.loss.dual_clip > 0 and c.loss.policy_loss == "cispo",
        "has no effect with {loss.policy_loss}; set it to 0",
    ),
    Rule(
        ERROR,
        "loss.sampler_correction",
        lambda c: _corrects(c) and c.rollout.top_p < 1,
        "is not possible with {rollout.top_p}, because the sampler's log-probabilities are those before the nucleus is "
        "cut and not those of what it draws; set rollout.top_p to 1, or the correction to none",
    ),
    Rule(
        ERROR,
        "loss.sampler_correction",
        lambda c: _corrects(c) and (c.rollout.has_views or c.rollout.attention_noise.sigma > 0),
        lambda c: (
            f"is not possible with {{rollout.{'views.keep' if c.rollout.has_views else 'attention_noise.sigma'}}}, "
            "because its weights would take back what is explored; set it to none"
        ),
    ),
    Rule(
        ERROR,
        "loss.filter_equal_rewards",
        lambda c: c.distills and c.loss.filter_equal_rewards,
        "is not possible with a teacher: it would exclude the groups that failed throughout, which have most to learn "
        "from one, from distillation too; set it to false",
    ),
    Rule(
        ERROR,
        "rollout.refill_rounds",
        lambda c: c.distills and c.rollout.refill_rounds > 0,
        "is not possible with a teacher: it would replace the groups that failed throughout, which have most to learn "
        "from one; set it to 0",
    ),
    *(
        Rule(ERROR, key, lambda c, key=key: _has_repeats(setting(c, key)), "must name each layer only once")
        for key in ("distill.attention_layers", "rollout.attention_noise.layers")
    ),
    Rule(
        ERROR,
        "rollout.attention_noise.grid",
        lambda c: c.rollout.attention_noise.grid > 0 and len(c.rollout.attention_noise.grids) > 0,
        "is not used with {rollout.attention_noise.grids}; name it there, or leave one of the two out",
    ),
    Rule(
        ERROR,
        "rollout.attention_noise.grids",
        lambda c: len(c.rollout.attention_noise.grids) > c.rollout.group_size,
        "has more values than {rollout.group_size}, so that the last ones are never used; leave some out",
    ),
    Rule(
        ERROR,
        "rollout.views.keep",
        lambda c: _is_rl(c) and c.rollout.has_views and c.rollout.attention_noise.sigma > 0,
        "is not possible with {rollout.attention_noise.sigma}, because a target has either explored views or explored "
        "attention; set it to 1, or the noise to 0",
    ),
    Rule(
        ERROR,
        "loss.attention_keys",
        lambda c: (
            _is_rl(c)
            and c.attention_acts
            and c.rollout.has_views
            and _target(c).needs is TargetPass.ROLLOUT
            and c.loss.attention_keys != "visual"
        ),
        "is not possible with {rollout.views.keep}, because a view says where a response looked in the picture alone; "
        "set visual",
    ),
    Rule(
        ERROR,
        "loss.attention_target",
        lambda c: c.distills and c.distill.teacher_rollouts > 0 and _target(c).needs is TargetPass.ROLLOUT,
        "reads the policy's own decoding, and with {distill.teacher_rollouts} the teacher answers prompts; set old",
    ),
    Rule(
        ERROR,
        "distill.teacher_rollouts",
        lambda c: c.distills and c.distill.teacher_rollouts > 0 and (c.loss.policy_coef > 0 or c.attention_acts),
        "is not possible with {loss.policy_coef} and {loss.attention_coef}, because responses of the teacher are not "
        "samples of the policy and have no advantages; set these two to 0, or distill.teacher_rollouts",
    ),
    Rule(
        ERROR,
        "distill.token_divergence",
        lambda c: c.distills and c.distill.token_divergence == "cross_entropy" and c.distill.teacher_rollouts < 1,
        "is the likelihood of the teacher's responses and needs distill.teacher_rollouts = 1, not "
        "{distill.teacher_rollouts}",
    ),
    *SAMPLER_RULES,
    # Settings without effect, and combinations that do something else than they seem to.
    *without_effect(
        "parallel sequence_parallel",
        lambda c: c.parallel.tensor_model_parallel_size == 1,
        "with {parallel.tensor_model_parallel_size}",
    ),
    *without_effect("adapter alpha targets", lambda c: c.adapter.rank == 0, "with {adapter.rank}"),
    *without_effect(_DISTILL_KEYS, lambda c: not _is_rl(c), "with {train.algorithm}"),
    *without_effect(_TEACHER_KEYS, lambda c: not _is_rl(c), "with {train.algorithm}"),
    *without_effect(_DISTILL_KEYS, lambda c: _is_rl(c) and not c.distills, "without teacher.path"),
    *without_effect(_TEACHER_KEYS, lambda c: _is_rl(c) and not c.distills, "without teacher.path"),
    Rule(
        WARNING,
        "loss.policy_coef",
        lambda c: _is_rl(c) and not c.distills and c.loss.policy_coef == 0 and not c.attention_acts,
        "without teacher.path: rewards give no gradient; set it to 1, or name a teacher",
    ),
    *without_effect(
        "teacher sequence_parallel",
        lambda c: c.distills and c.teacher_layout[0] == 1,
        "with one tensor-parallel rank of the teacher",
    ),
    Rule(
        WARNING,
        "distill.token_coef",
        lambda c: c.distills and c.distill.token_coef == 0 and c.distill.attention_coef == 0,
        "with {distill.attention_coef}: divergences from the teacher are only logged",
    ),
    *without_effect(
        "distill beta",
        lambda c: c.distills and c.distill.token_divergence != "jsd",
        "with {distill.token_divergence}",
    ),
    *without_effect(
        "distill temperature top_tokens",
        lambda c: c.distills and c.distill.token_divergence == "cross_entropy",
        "with {distill.token_divergence}",
    ),
    *without_effect(
        "distill attention_exclude_self",
        lambda c: c.distills and c.distill.attention_keys == "visual",
        "with {distill.attention_keys}, because no query's own token is a visual one",
    ),
    *without_effect(
        "loss policy_loss clip_low clip_high dual_clip",
        lambda c: c.distills and c.loss.policy_coef == 0,
        "with {loss.policy_coef}",
    ),
    *without_effect(
        "loss sampler_correction sampler_correction_cap",
        lambda c: not _is_rl(c) or c.loss.policy_coef == 0,
        lambda c: "with {loss.policy_coef}" if _is_rl(c) else "with {train.algorithm}",
    ),
    *without_effect(
        "loss sampler_correction_cap",
        lambda c: _is_rl(c) and c.loss.policy_coef > 0 and c.loss.sampler_correction == "none",
        "with {loss.sampler_correction}",
    ),
    Rule(
        WARNING,
        "loss.attention_coef",
        lambda c: _is_rl(c) and not c.attention_acts and not c.distills,
        "turns the attention term off: this run is GRPO",
    ),
    Rule(
        WARNING,
        "loss.attention_target",
        lambda c: _is_rl(c) and c.attention_acts and _target(c).is_zero_on_policy and c.updates_per_rollout == 1,
        lambda c: (
            "with one optimizer step per rollout: the divergence and its gradient are exactly zero and this run is "
            "GRPO for any attention_coef; raise rollout.num_minibatches or rollout.num_epochs, or set "
            "loss.attention_target = "
            + next(name for name, rules in TARGETS.items() if rules.needs is TargetPass.REFERENCE)
        ),
    ),
    Rule(
        WARNING,
        "loss.attention_target",
        lambda c: (
            _is_rl(c)
            and c.attention_acts
            and _target(c).needs_noise
            and c.rollout.attention_noise.sigma == 0
            and not c.rollout.has_views
        ),
        lambda c: (
            "has next to no signal with {rollout.attention_noise.sigma}, because the responses of a group hardly "
            f"differ in where they look; set it to {1 if c.rollout.attention_noise.scale == 'lead' else 6}, say"
        ),
    ),
    *without_effect(
        "loss attention_rows",
        lambda c: _is_rl(c) and c.loss.attention_target == "hindsight",
        "with {loss.attention_target}, whose only row is the prompt's last one",
    ),
    *without_effect(
        keys_of("rollout.attention_noise", AttentionNoiseConfig, but="sigma"),
        lambda c: _is_rl(c) and c.rollout.attention_noise.sigma == 0,
        "with {rollout.attention_noise.sigma}",
    ),
    *without_effect("rollout.views grid", lambda c: _is_rl(c) and not c.rollout.has_views, "with {rollout.views.keep}"),
    *without_effect(
        "loss attention_coef attention_coef_warmup_steps attention_coef_decay",
        lambda c: _is_rl(c) and c.loss.attention_grad_ratio > 0,
        "with {loss.attention_grad_ratio}, which chooses the coefficient itself",
    ),
    *_target_warnings(),
    *without_effect(
        "loss attention_exclude_self",
        lambda c: _is_rl(c) and c.loss.attention_keys == "visual",
        "with {loss.attention_keys}, because no query's own token is a visual one",
    ),
    *without_effect("loss kl_estimator kl_clamp", lambda c: _is_rl(c) and c.loss.kl_coef == 0, "with {loss.kl_coef}"),
    *without_effect(
        "model reference_path",
        lambda c: _is_rl(c) and not c.needs_reference,
        "with {loss.kl_coef} and {loss.attention_target}: no reference is held",
    ),
    Rule(
        WARNING,
        "loss.policy_loss",
        lambda c: (
            _is_rl(c)
            and c.loss.policy_loss == "gspo"
            and c.loss.policy_coef > 0
            and (c.loss.clip_high > 0.01 or c.loss.aggregation != "sequence_mean")
        ),
        "with {loss.clip_high} and {loss.aggregation}: ratios of whole responses move little, and its paper has "
        "clip_low = 3.0e-4, clip_high = 4.0e-4 and aggregation = sequence_mean",
    ),
)
"""Rules over a configuration."""


def check_settings(config: RunConfig) -> None:
    """Raise ConfigError at the first impossible combination of settings."""
    _raise_first(RULES, config)


def check_layout(config: RunConfig, world_size: int, training: bool = True) -> None:
    """Check that a number of processes can run a configuration.

    Args:
        world_size: number of processes.
        training: check batch sizes as well.

    Raises:
        ConfigError: they cannot.
    """
    _raise_first(LAUNCH_RULES, Launch(config, world_size, training))


def setting_warnings(config: RunConfig) -> list[str]:
    """Return one sentence for each setting without effect and each combination that does not do what it seems to."""
    return [str(rule.error(config)) for rule in RULES if rule.severity is WARNING and rule.applies(config)]


def _raise_first(rules: tuple[Rule, ...], subject: Subject) -> None:
    for rule in rules:
        if rule.severity is ERROR and rule.applies(subject):
            raise rule.error(subject)
