"""A setting without effect is named before the run; the defaults name none."""

import pytest

from megatron_ral.config.sections import LossConfig, ModelConfig, ParallelConfig, RolloutConfig, RunConfig
from megatron_ral.config.silent_settings import silent_setting_warnings


def warnings(**sections) -> str:
    return "\n".join(silent_setting_warnings(RunConfig(**sections)))


def test_the_defaults_are_silent():
    assert not warnings()


@pytest.mark.parametrize(
    "loss, said",
    [
        ({"attention_coef": 0.0}, "this run is GRPO"),
        ({"attention_grad_ratio": 0.1, "attention_coef": 5.0}, "loss.attention_coef = 5.0 has no effect"),
        ({"attention_grad_ratio": 0.1, "attention_coef_warmup_steps": 3}, "loss.attention_coef_warmup_steps = 3"),
        (
            {"attention_target": "oracle", "attention_keys": "visual", "attention_advantages": "shuffled"},
            "loss.attention_advantages = shuffled has no effect",
        ),
        (
            {"attention_target": "hindsight", "attention_keys": "visual", "attention_negative_weight": 0.5},
            "loss.attention_negative_weight = 0.5 has no effect",
        ),
        ({"attention_ema_decay": 0.5}, "loss.attention_ema_decay = 0.5 has no effect"),
        (
            {"attention_keys": "visual", "attention_exclude_self": False},
            "loss.attention_exclude_self = False has no effect",
        ),
        ({"kl_coef": 0.0, "kl_clamp": 10.0}, "loss.kl_clamp = 10.0 has no effect"),
        ({"kl_estimator": "k1"}, "expected gradient of 0"),
        ({"policy_loss": "gspo"}, "loss.policy_loss = gspo"),
    ],
)
def test_settings_of_the_loss(loss, said):
    assert said in warnings(loss=LossConfig(**loss))


def test_settings_beside_the_loss():
    assert "exactly zero" in warnings(rollout=RolloutConfig(num_minibatches=1))
    assert not warnings(rollout=RolloutConfig(num_minibatches=1), loss=LossConfig(attention_target="reference"))
    assert "sequence_parallel has no effect" in warnings(parallel=ParallelConfig(sequence_parallel=True))
    assert not warnings(parallel=ParallelConfig(sequence_parallel=True, tensor_model_parallel_size=2))
    held = {"model": ModelConfig(path="a", reference_path="b")}
    assert not warnings(**held) and "reference_path has no effect" in warnings(**held, loss=LossConfig(kl_coef=0.0))
