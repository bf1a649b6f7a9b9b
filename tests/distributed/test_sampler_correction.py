"""Weights against the sampler in whole RL steps: equal samplers change nothing, others reach every update."""

import dataclasses
import math

import pytest

from megatron_ral.config.sections import RewardConfig, RewardFunctionConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.parallel.process_groups import stop_groups
from megatron_ral.rollout.native_sampler import NativeSampler
from megatron_ral.rollout.settings import RolloutSettings
from megatron_ral.training.step import Engines, StepSettings, rl_step
from tests.distributed.cases import LENGTH, fixed_groups, full_weights, open_policy
from tests.distributed.runner import run_ranks


class OtherSampler(NativeSampler):
    """The native sampler, whose log-probabilities are `shift` too low at every token."""

    def __init__(self, engine, shift):
        super().__init__(engine)
        self.shift = shift

    def sample(self, *arguments):
        for batch in super().sample(*arguments):
            lower = batch.responses.rollout_logprobs - self.shift
            yield dataclasses.replace(batch, responses=dataclasses.replace(batch.responses, rollout_logprobs=lower))


def one_rollout(path: str, data: str, tensor: int, pipeline: int, num_epochs: int, shift: float, correction: str):
    """Metrics and changes of the weights of one RL step with two minibatches."""
    config, _, _, policy, objective = open_policy(
        path, tensor, pipeline, sampler_correction=correction, kl_coef=0.0, attention_target="old"
    )
    config = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, num_minibatches=2, num_epochs=num_epochs),
        reward=RewardConfig(
            functions={"made_up": RewardFunctionConfig("tests.distributed.user_rewards:made_up_reward", 1.0)}
        ),
    )
    before, prompts = full_weights(policy), [row[0] for row in fixed_groups(path, data)]
    share = len(prompts) // policy.layout.data_size
    report = rl_step(
        Engines(policy, OtherSampler(policy, shift) if shift else NativeSampler(policy)),
        prompts[policy.layout.data_rank * share :][:share],
        PromptProcessor(path, 128),
        objective,
        RolloutSettings.from_config(config),
        StepSettings.from_config(config),
        0,
        measure_gradient_ratio=False,
    )
    weights = full_weights(policy)
    stop_groups()
    return report.metrics, {name: weights[name] - before[name] for name in weights}


@pytest.mark.parametrize("world, tensor, pipeline", [(1, 1, 1), (4, 2, 2)])
def test_with_equal_samplers_the_update_is_that_without_the_correction(material, world, tensor, pipeline):
    """Float32: the sampler decodes token by token, the update reads whole sequences; only the rounding differs. The
    log-probability of a token is near -6, where two spacings of float32 are 1e-6; a response adds up to seven."""
    arguments = str(material["tiny"]), str(material["data"]), tensor, pipeline, 1, 0.0
    wanted, changes = run_ranks(world, one_rollout, *arguments, "none")[-1]
    for mode, tokens in (("token_truncate", 1), ("sequence_mask", LENGTH)):
        metrics, ours = run_ranks(world, one_rollout, *arguments, mode)[-1]
        assert metrics["sampling/ratio_mean"] == pytest.approx(1.0, abs=1e-6 * tokens), mode
        assert 1.0 - 1e-6 <= metrics["sampling/ratio_max"] <= 1.0 + 2e-5 and metrics["sampling/ratio_cut"] == 0.0
        assert metrics.keys() - wanted.keys() == {f"sampling/ratio_{name}" for name in ("mean", "max", "cut")}
        for name in ("reward", "loss/policy", "grad_norm", "sampling/logprob_difference"):
            assert metrics[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name
        moved = {name: change for name, change in changes.items() if change.any()}
        assert len(moved) > 30
        for name, change in moved.items():
            assert (ours[name] - change).norm() <= 1e-3 * change.norm(), name


@pytest.mark.parametrize(
    "mode, num_epochs, factor, largest, cut",
    [
        ("token_truncate", 1, 1.5, 1.5, 0.0),
        ("token_truncate", 2, 3.0, 3.0, 1.0),
        ("sequence_mask", 2, 3.0, 3.0**7, 1.0),
    ],
)
def test_every_update_of_a_rollout_has_the_samplers_logprobs(material, mode, num_epochs, factor, largest, cut):
    """A token that some update weighted by something else would move the mean. With one epoch the first update is on
    policy and the second is not; with two the same samples come back when the policy has moved."""
    arguments = str(material["tiny"]), str(material["data"]), 1, 2, num_epochs, math.log(factor), mode
    metrics, changes = run_ranks(2, one_rollout, *arguments)[-1]
    assert metrics["sampling/logprob_difference"] == pytest.approx(math.log(factor), rel=1e-5)
    assert metrics["sampling/ratio_max"] == pytest.approx(largest, rel=1e-4) and metrics["sampling/ratio_cut"] == cut
    if mode == "token_truncate":
        assert metrics["sampling/ratio_mean"] == pytest.approx(factor, rel=1e-5)
        assert any(change.any() for change in changes.values())
    else:
        assert metrics["loss/policy"] == 0.0, "every response is masked"
