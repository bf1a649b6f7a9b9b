"""What TensorBoard shows first, as data: curves that belong on one chart, and what runs are compared by."""

from typing import Any

from megatron_ral.config import RunConfig, flat_settings

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
        "mass on the target": ["Multiline", [r"^attention/target_mass$", r"^distill/.*_target_mass$"]],
        "where rows look": ["Multiline", [r"^attention/(visual|prompt|sink|self)_mass$"]],
    },
    "policy": {
        "kl": ["Multiline", [r"^kl$"]],
        "clipped": ["Multiline", [r"^clip_ratio/.*"]],
        "entropy": ["Multiline", [r"^entropy$"]],
        "ratio": ["Multiline", [r"^ratio$"]],
        "sampler against training engine": ["Multiline", [r"^sampling/logprob_difference$"]],
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
"""Tag -> of how many of its last values the mean is what a run is compared by, as `final/<tag>`."""


def method(config: RunConfig) -> str:
    """One word for what a run is: sft, distill, ral, ral+distill, or its policy loss (grpo, gspo, cispo)."""
    if config.train.algorithm == "sft":
        return "sft"
    names = [name for name, acts in (("ral", config.attention_acts), ("distill", config.distills)) if acts]
    return "+".join(names) or config.loss.policy_loss


def hyperparameters(config: RunConfig) -> dict[str, bool | int | float | str]:
    """Return every setting by dotted key as a scalar, and `_method`, which sorts before them in HPARAMS.

    Items of a list of sections have keys of their own; other lists are one text.
    """
    flat: dict[str, bool | int | float | str] = {"_method": method(config)}

    def add(key: str, value: Any) -> None:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for index, section in enumerate(value):
                for name, item in section.items():
                    add(f"{key}.{index}.{name}", item)
        else:
            flat[key] = ", ".join(map(str, value)) if isinstance(value, (list, dict)) else value

    for key, value in flat_settings(config).items():
        add(key, value)
    return flat
