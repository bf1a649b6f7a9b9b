"""Charts of a run, and the settings and figures by which runs are compared."""

from typing import Any, Mapping

LAYOUT = {
    "reward": {
        "reward": ["Multiline", [r"^reward$", r"^reward_std$", r"^frac_reward_zero_std$"]],
        "parts of the reward": ["Multiline", [r"^rewards/.*/mean$"]],
        "responses": ["Multiline", [r"^completions/mean_length$"]],
        "responses cut at the limit": ["Multiline", [r"^completions/clipped_ratio$"]],
    },
    "attention": {
        "divergence": ["Multiline", [r"^attention/divergence.*", r"^distill/attention_divergence$"]],
        "gradient against the token terms'": [
            "Multiline",
            [r"^attention/grad_ratio$", r"^distill/attention_grad_ratio$"],
        ],
        "mass on the target": ["Multiline", [r"^attention/target_(mass|deciding|peak)$", r"^distill/.*_target_mass$"]],
        "mass on the target at deciding rows": ["Multiline", [r"^attention/target_deciding/layer_.*"]],
        "where rows look": ["Multiline", [r"^attention/(visual|prompt|sink|self)_mass$"]],
    },
    "policy": {
        "kl": ["Multiline", [r"^kl$"]],
        "clipped": ["Multiline", [r"^clip_ratio/.*"]],
        "entropy": ["Multiline", [r"^entropy$"]],
        "ratio": ["Multiline", [r"^ratio$"]],
        "sampler against training engine": ["Multiline", [r"^sampling/logprob_difference$"]],
        "training engine / sampler": ["Multiline", [r"^sampling/ratio_(mean|max)$"]],
        "ratios to the sampler above the cap": ["Multiline", [r"^sampling/ratio_cut$"]],
        "updates since sampling": ["Multiline", [r"^sampling/staleness$"]],
        "optimizer": ["Multiline", [r"^grad_norm$", r"^skipped_steps$"]],
        "loss": ["Multiline", [r"^loss$", r"^loss/.*"]],
    },
    "throughput": {
        "samples per second": ["Multiline", [r"^throughput/samples_per_second$"]],
        "tokens per second": ["Multiline", [r"^throughput/.*_tokens_per_second$"]],
        "model TFLOP/s of a rank": ["Multiline", [r"^throughput/model_tflops_per_rank$"]],
        "utilisation": ["Multiline", [r"^throughput/mfu$"]],
        "time by phase": ["Multiline", [r"^timing/share/.*"]],
        "memory, GiB": ["Multiline", [r"^memory/.*"]],
    },
    "evaluation": {
        "accuracy": ["Multiline", [r"^eval/(accuracy|format_rate)$"]],
        "unscored": ["Multiline", [r"^eval/(unparsed|error)_rate$"]],
        "attention": ["Multiline", [r"^eval/(target_attention|visual_mass)$"]],
        "attention on the target at deciding rows": ["Multiline", [r"^eval/target_deciding/layer_.*"]],
    },
}
"""Category -> chart -> its curves, as regular expressions over tags."""

FINAL = {
    "eval/accuracy": 1,
    "eval/format_rate": 1,
    "eval/target_attention": 1,
    "reward": 10,
    "kl": 10,
    "loss": 10,
    "attention/divergence": 10,
    "attention/target_mass": 10,
    "completions/mean_length": 10,
    "throughput/samples_per_second": 10,
}
"""Tag -> number of its last values whose mean is logged as `final/<tag>`, by which runs are compared."""


def method_name(algorithm: str, policy_loss: str, *, trains_attention: bool, distills: bool) -> str:
    """Return one word for the method of a run: sft, distill, ral, ral+distill, or its policy loss (grpo, gspo, cispo).

    Args:
        algorithm: train.algorithm.
        policy_loss: loss.policy_loss.
        trains_attention: Whether the attention term has a gradient.
        distills: Whether the run has a teacher.
    """
    if algorithm == "sft":
        return "sft"
    names = [name for name, acts in (("ral", trains_attention), ("distill", distills)) if acts]
    return "+".join(names) or policy_loss


def hyperparameters(settings: Mapping[str, Any], method: str) -> dict[str, bool | int | float | str]:
    """Return every setting as a scalar or text, after `_method`, which thus is the first column of HPARAMS.

    Items of a list of sections get keys of their own (`data.train.0.shards`).

    Args:
        settings: Settings of a run with plain values by dotted key.
        method: Method of the run.
    """
    flat: dict[str, bool | int | float | str] = {"_method": method}
    for key, value in settings.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for index, section in enumerate(value):
                flat |= {f"{key}.{index}.{name}": _scalar(item) for name, item in section.items()}
        else:
            flat[key] = _scalar(value)
    return flat


def _scalar(value: Any) -> bool | int | float | str:
    if isinstance(value, (tuple, list, dict)):
        return ", ".join(map(str, value))
    return "" if value is None else value
