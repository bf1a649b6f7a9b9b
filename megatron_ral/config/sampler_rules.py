"""Table of the rules about samplers; like `rules.py`."""

from megatron_ral.attention.targets.registry import TARGETS, TargetPass
from megatron_ral.config.rule import Rule, Severity, keys_of, without_effect
from megatron_ral.config.sampler import VllmConfig
from megatron_ral.config.sections import AttentionNoiseConfig, RunConfig, ViewsConfig

ERROR, WARNING = Severity.ERROR, Severity.WARNING


def _is_served(config: RunConfig) -> bool:
    """Say whether responses come from a server."""
    return config.train.algorithm == "ral" and config.rollout.sampler != "native"


def _reads_decoding(config: RunConfig) -> bool:
    """Say whether the attention target reads rows that decoding recorded. Rows of views need no decoding."""
    target = TARGETS.get(config.loss.attention_target)
    return target is not None and target.needs is TargetPass.ROLLOUT and not config.rollout.has_views


def _reads_rollout(config: RunConfig) -> bool:
    """Say whether the attention target reads rows of the model that sampled."""
    target = TARGETS.get(config.loss.attention_target)
    return target is not None and target.needs is TargetPass.ROLLOUT


def _has_no_samples(config: RunConfig) -> bool:
    """Say whether no response is the policy's own."""
    return config.distills and config.distill.teacher_rollouts == 1


SAMPLER_RULES: tuple[Rule, ...] = (
    Rule(
        ERROR,
        "rollout.overlap",
        lambda c: c.overlaps and (c.rollout.has_views or c.rollout.attention_noise.sigma > 0),
        lambda c: (
            f"is not possible with {{rollout.{'views.keep' if c.rollout.has_views else 'attention_noise.sigma'}}}, "
            "because weights against samples of older weights would also take back what is explored; set it to false"
        ),
    ),
    Rule(
        ERROR,
        "rollout.overlap",
        lambda c: c.overlaps and _reads_rollout(c),
        "is not possible with {loss.attention_target}, whose rows would be those of older weights, which no checkpoint "
        "holds; set it to false, or another target",
    ),
    Rule(
        ERROR,
        "rollout.vllm.python",
        lambda c: _is_served(c) and not c.rollout.vllm.python,
        "is empty, but {rollout.sampler} needs an environment of its own; make it with launch_scripts/setup_vllm.sh "
        "and name its interpreter",
        lambda c: None,
    ),
    Rule(
        ERROR,
        "rollout.sampler",
        lambda c: _is_served(c) and c.rollout.attention_noise.sigma > 0,
        "is not possible with {rollout.attention_noise.sigma}, because its attention cannot be changed; set native",
    ),
    Rule(
        ERROR,
        "rollout.sampler",
        lambda c: _is_served(c) and _reads_decoding(c),
        "is not possible with {loss.attention_target}, which reads attention that only the native sampler records; set "
        "native, or another target",
    ),
    Rule(
        ERROR,
        "rollout.temperature",
        lambda c: _is_served(c) and c.rollout.temperature != 1 and c.rollout.top_p < 1,
        "is not possible with {rollout.sampler} and {rollout.top_p}, because log-probabilities at this temperature "
        "would be those behind the cut nucleus; set it to 1, or rollout.top_p to 1",
    ),
    Rule(
        ERROR,
        "rollout.vllm.request_seconds",
        lambda c: (
            _is_served(c)
            and 2 * c.rollout.vllm.request_seconds + c.rollout.vllm.start_seconds >= 60 * c.parallel.timeout_minutes
        ),
        "is too long: two of it and {rollout.vllm.start_seconds} last longer than {parallel.timeout_minutes}, in which "
        "the copy's other ranks wait; lower one of them",
    ),
    Rule(
        WARNING,
        "loss.sampler_correction",
        lambda c: (
            _is_served(c)
            and not c.rollout.overlap
            and c.rollout.top_p == 1
            and not c.rollout.has_views
            and c.loss.policy_coef > 0
            and c.loss.sampler_correction == "none"
        ),
        "with {rollout.sampler} leaves the difference between sampler and training engine uncorrected; set "
        "token_truncate",
    ),
    Rule(
        WARNING,
        "loss.sampler_correction",
        lambda c: c.overlaps and c.loss.policy_coef > 0 and c.loss.sampler_correction == "none",
        "with {rollout.overlap} trains on samples of older weights as if they were of the present ones; set "
        "token_truncate",
    ),
    *without_effect(
        keys_of("rollout.attention_noise", AttentionNoiseConfig),
        _has_no_samples,
        "with {distill.teacher_rollouts}, because the teacher answers every prompt",
    ),
    *without_effect(
        keys_of("rollout.views", ViewsConfig),
        _has_no_samples,
        "with {distill.teacher_rollouts}, because the teacher answers every prompt",
    ),
    *without_effect("rollout overlap", lambda c: c.train.algorithm != "ral", "with {train.algorithm}"),
    *without_effect(
        keys_of("rollout.vllm", VllmConfig),
        lambda c: not _is_served(c),
        lambda c: "with {rollout.sampler}" if c.train.algorithm == "ral" else "with {train.algorithm}",
    ),
)
"""Rules over a configuration that name a sampler."""
