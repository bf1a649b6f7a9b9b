"""The first update of a rollout, which leaves out the pass before it, is the update with that pass."""

import dataclasses

import pytest

from megatron_ral.config.sections import RewardConfig, RewardFunctionConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.parallel.process_groups import stop_groups
from megatron_ral.rollout.native_sampler import NativeSampler
from megatron_ral.rollout.settings import RolloutSettings
from megatron_ral.training import step as steps
from tests.distributed.cases import fixed_groups, full_weights, open_policy
from tests.distributed.runner import run_ranks


def one_rollout(path: str, data: str, pipeline: int, num_minibatches: int, target: str, left_out: int) -> dict:
    """One RL step in which `left_out` updates are believed to need no pass of the old policy."""
    steps.num_on_policy_updates = lambda num_epochs: left_out
    config, _, _, policy, objective = open_policy(
        path,
        1,
        pipeline,
        attention_target=target,
        attention_keys="prompt",
        attention_layers=(1, -1),
        kl_coef=0.0,
    )
    config = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, num_minibatches=num_minibatches, num_epochs=1),
        reward=RewardConfig(
            functions={"made_up": RewardFunctionConfig("tests.distributed.user_rewards:made_up_reward", 1.0)}
        ),
    )
    before, passed, forward = full_weights(policy), [], policy.forward

    def counted(batches, *arguments, **settings):
        passed.append(len(batches))
        return forward(batches, *arguments, **settings)

    policy.forward = counted
    report = steps.rl_step(
        steps.Engines(policy, NativeSampler(policy)),
        [row[0] for row in fixed_groups(path, data)],
        PromptProcessor(path, 128),
        objective,
        RolloutSettings.from_config(config),
        steps.StepSettings.from_config(config),
        0,
        measure_gradient_ratio=True,
    )
    weights = full_weights(policy)
    stop_groups()
    return {
        "changes": {name: weights[name] - before[name] for name in weights},
        "metrics": report.metrics,
        "passed": passed,
    }


@pytest.mark.parametrize("target, pipeline, num_minibatches", [("old", 1, 2), ("old", 2, 1), ("hindsight", 2, 2)])
def test_a_step_without_the_pass_equals_one_with_it(material, target, pipeline, num_minibatches):
    arguments = (str(material["tiny"]), str(material["data"]), pipeline, num_minibatches, target)
    wanted, ours = (run_ranks(pipeline, one_rollout, *arguments, left_out)[-1] for left_out in (0, 1))
    per_update = 4 // num_minibatches  # 8 prompts in micro-batches of 2
    assert wanted["passed"] == [4]
    assert ours["passed"] == ([4 - per_update] if num_minibatches > 1 else [])
    assert wanted["metrics"].keys() == ours["metrics"].keys()
    assert wanted["metrics"]["reward_std"] > 0.1 and wanted["metrics"]["sampling/logprob_difference"] < 1e-5
    for name, value in wanted["metrics"].items():
        assert ours["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    moved = {name: change for name, change in wanted["changes"].items() if change.any()}
    assert len(moved) > 30  # the tower is frozen
    for name, change in moved.items():
        assert (ours["changes"][name] - change).norm() <= 1e-3 * change.norm(), name
