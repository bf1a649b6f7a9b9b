"""Rollouts one step ahead: sampled with the weights that the step before began with, whatever fails meanwhile."""

import dataclasses
import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ral.config.sections import RewardConfig, RewardFunctionConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.errors import UserError
from megatron_ral.parallel.process_groups import stop_groups
from megatron_ral.rollout.ahead import RolloutsAhead
from megatron_ral.rollout.native_sampler import NativeSampler
from megatron_ral.rollout.settings import RolloutSettings
from megatron_ral.training.step import Engines, StepSettings, overlapped_step
from tests.distributed.cases import fixed_groups, micro_batches, open_policy
from tests.distributed.runner import run_ranks
from tests.distributed.test_served_sampler import SAMPLING, open_sampler, train

NUM_STEPS, NUM_UPDATES = 3, 2


class WatchedSampler(NativeSampler):
    """The native sampler, which notes each rollout and the updates that were made before it."""

    def __init__(self, engine):
        super().__init__(engine)
        self.calls = []

    def sample(self, prompts, settings, batch_size, *identity):
        self.calls.append((identity[-1], self.engine.num_steps_taken, len(prompts)))
        yield from super().sample(prompts, settings, batch_size, *identity)


def native_run(path: str, data: str, tensor: int, pipeline: int) -> dict:
    """A run of three steps of two updates, each on the same two prompts per rank."""
    config, _, _, policy, objective = open_policy(
        path, tensor, pipeline, sampler_correction="token_truncate", kl_coef=0.0, attention_target="old"
    )
    reward = {"made_up": RewardFunctionConfig("tests.distributed.user_rewards:made_up_reward", 1.0)}
    config = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, num_minibatches=NUM_UPDATES, num_epochs=1, overlap=True),
        reward=RewardConfig(functions=reward),
        train=dataclasses.replace(config.train, num_steps=NUM_STEPS),
    )
    prompts = [row[0] for row in fixed_groups(path, data)]
    share = len(prompts) // policy.layout.data_size
    own = prompts[policy.layout.data_rank * share :][:share]
    sampler, settings = WatchedSampler(policy), RolloutSettings.from_config(config)
    loader: Any = SimpleNamespace(places={})
    ahead = RolloutsAhead(policy, sampler, PromptProcessor(path, 128), settings, loader)
    engines, step_settings = Engines(policy, sampler), StepSettings.from_config(config)
    metrics, taken = [], []

    def take():
        taken.append(policy.num_steps_taken)
        return own

    for step in range(NUM_STEPS):
        report = overlapped_step(engines, ahead, take, objective, settings, step_settings, step, False)
        metrics.append(report.metrics)
        assert (ahead.pending is None) == (step == NUM_STEPS - 1)
        assert report.sampling_seconds > 0 and set(report.seconds) <= {"data", "rollout", "old", "update"}
    stop_groups()
    return {"calls": sampler.calls, "metrics": metrics, "taken": taken, "share": share}


@pytest.mark.parametrize("world, tensor, pipeline", [(1, 1, 1), (2, 1, 2)])
def test_a_step_trains_on_what_was_sampled_before_the_updates_of_the_step_before(material, world, tensor, pipeline):
    for result in run_ranks(world, native_run, str(material["tiny"]), str(material["data"]), tensor, pipeline):
        assert result["calls"] == [(0, 0, result["share"]), (1, 0, result["share"]), (2, NUM_UPDATES, result["share"])]
        assert result["taken"] == [0, 0, NUM_UPDATES], "the last step reads no prompts"
        first, second, third = result["metrics"]
        assert [step["sampling/staleness"] for step in result["metrics"]] == [0.0, NUM_UPDATES, NUM_UPDATES]
        assert first["sampling/ratio_max"] == pytest.approx(1.0, abs=1e-4)
        assert first["sampling/logprob_difference"] < 1e-4 < second["sampling/logprob_difference"]
        assert second["sampling/ratio_max"] > 1.01 and third["sampling/ratio_max"] > 1.01


def responses(sampler, prompts, *identity) -> list[tuple]:
    """Tokens, log-probabilities and version of the responses to each prompt."""
    found = []
    for batch in sampler.sample(prompts, SAMPLING, 2, *identity):
        rows = zip(batch.responses.response_ids, batch.responses.response_lengths, batch.responses.rollout_logprobs)
        for (ids, lengths, logprobs), version in zip(rows, batch.versions):
            groups = [row[:length].tolist() for row, length in zip(ids, lengths)]
            values = [row[:length].tolist() for row, length in zip(logprobs, lengths)]
            found.append((groups, values, version))
    return found


def served_ahead(path: str, data: str, tensor: int, folder: str, kills: bool, options: dict) -> dict:
    """Responses of a server to a rollout that was begun before an update, and of the native sampler before and after.

    Args:
        kills: Kill the server when all is answered, before the update.
        options: Further options of the engine and the settings.
    """
    opened, sampler = open_sampler(path, tensor, 1, folder, **options)
    policy = opened[3]
    prompts = [row[0] for row in fixed_groups(path, data)[:4]]
    rollout, native = micro_batches(fixed_groups(path, data)[:2], 2, policy), NativeSampler(policy)
    result: dict[str, Any] = {"old": responses(native, prompts, 7, 0)}
    background = sampler.begin(prompts, SAMPLING, 2, 7, 0)
    assert background is not None
    try:
        sampler.begin(prompts, SAMPLING, 2, 7, 1)
    except AssertionError as error:
        result["refused"] = str(error)
    if kills:
        until = time.monotonic() + 100.0
        while background.is_running and time.monotonic() < until:
            time.sleep(0.05)  # nobody asks for the answers, and still they are taken
        if sampler.client is not None:
            os.kill(sampler.client.pid, signal.SIGKILL)
    train(opened, rollout)
    result["new"] = responses(native, prompts, 7, 0)
    try:
        result["found"] = responses(sampler, prompts, 7, 0)
        result["failures"] = sampler.num_failures
        result["later"] = responses(sampler, prompts[:1], 7, 1)
        result["wanted_later"] = responses(native, prompts[:1], 7, 1)
    except UserError as error:
        result["error"] = str(error)
    result |= {name: getattr(sampler, name) for name in ("num_pushes", "num_failures", "num_foreign_samples")}
    result["seconds"], result["owns"] = background.seconds, sampler.owns
    sampler.close()
    stop_groups()
    return result


def check_from(result: dict, found: str, wanted: list[tuple]) -> None:
    """Tokens are those of the native sampler with the same weights; log-probabilities differ by rounding."""
    assert len(result[found]) == len(wanted)
    for (tokens, values, version), (other_tokens, other_values, other_version) in zip(result[found], wanted):
        assert (tokens, version) == (other_tokens, other_version)
        for row, other in zip(values, other_values):
            assert row == pytest.approx(other, abs=2e-5)


@pytest.mark.parametrize(
    "fault, tensor, num_redone, failures, pushes",
    [
        ("", 2, 0, (0, 0), 2),
        ("killed when idle", 1, 0, (0, 1), 2),
        ("stalls later", 2, 0, (1, 1), 2),
        ("dies", 2, 3, (1, 1), 2),
    ],
)
def test_only_a_server_that_is_lost_before_it_answers_gets_newer_weights(
    material, tmp_path, fault, tensor, num_redone, failures, pushes
):
    """Requests are of two prompts. Where the server dies it has answered one; a stalled one is given up after 20 s."""
    options = {"faults": [fault], "once": str(tmp_path / "failed"), "seconds": 20.0 if "stalls" in fault else 100.0}
    arguments = str(material["tiny"]), str(material["data"]), tensor, str(tmp_path), "idle" in fault, options
    for result in run_ranks(tensor, served_ahead, *arguments):
        old, new = result["old"], result["new"]
        assert all(one[:2] != other[:2] for one, other in zip(old, new)), "the update has moved every prompt"
        kept = len(old) - num_redone
        check_from(result, "found", old[:kept] + new[kept:])
        check_from(result, "later", result["wanted_later"])
        assert [version for *_, version in result["found"]] == [0] * kept + [1] * num_redone
        assert (result["failures"], result["num_failures"]) == failures and result["num_foreign_samples"] == 0
        assert result["num_pushes"] == pushes
        assert result["refused"] == "requests of another rollout are under way"
        assert (result["seconds"] > 0) == result["owns"]


def test_a_server_that_dies_twice_ends_every_rank_with_one_message(material, tmp_path):
    arguments = str(material["tiny"]), str(material["data"]), 2, str(tmp_path), False, {"faults": ["dies"]}
    one, other = run_ranks(2, served_ahead, *arguments)
    assert one["error"] == other["error"] and "failed twice in one rollout: " in one["error"]
    assert "found" not in one
