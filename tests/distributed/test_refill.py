"""Groups without signal are replaced by new prompts, the same ones on any number of ranks."""

import dataclasses
import zlib

import pytest

from megatron_ral.config.sections import RewardConfig, RewardFunctionConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.functional.advantages import has_signal
from megatron_ral.models.shape import read_shape
from megatron_ral.parallel.process_groups import start_groups, stop_groups
from megatron_ral.rollout.collect import collect_rollout
from megatron_ral.rollout.lengths import MicroBatchSettings
from megatron_ral.rollout.metrics import refill_metrics
from megatron_ral.rollout.native_sampler import NativeSampler
from megatron_ral.rollout.settings import RolloutSettings
from megatron_ral.training.build import build_policy
from tests.distributed.cases import make_config, open_loader, responses_by_prompt
from tests.distributed.runner import run_ranks

NUM_PROMPTS = 8


def rare_reward(completion: str, solution: str, problem_type: str) -> float:
    """1 for one response in eight, so that two of three groups have no signal."""
    return float(zlib.crc32(completion.encode()) % 8 == 0)


def refilled(path: str, data: str, tensor: int, pipeline: int, num_rounds: int) -> dict:
    config = make_config(path, tensor=tensor, pipeline=pipeline)
    functions = {"rare": RewardFunctionConfig(f"{__name__}:rare_reward", 1.0)}
    config = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, refill_rounds=num_rounds, max_response_length=4),
        reward=RewardConfig(accuracy_weight=0.0, format_weight=0.0, functions=functions),
    )
    process_groups = start_groups(tensor_size=tensor, pipeline_size=pipeline, seed=0)
    policy = build_policy(config, read_shape(path), process_groups)
    processor = PromptProcessor(path, 128)
    loader = open_loader(f"{data}/rl-*.tar", processor, process_groups)
    draws = []

    def draw(slots):
        draws.append(len(slots))
        return loader.fill(slots)

    prompts = loader.take(NUM_PROMPTS)
    settings = RolloutSettings.from_config(config)
    rollout = collect_rollout(
        policy, NativeSampler(policy), prompts, processor, settings, 0, MicroBatchSettings(2), draw=draw
    )
    metrics, position = refill_metrics(rollout.sampled_rewards, policy), loader.state()["offset"]
    stop_groups()
    groups = responses_by_prompt(rollout.batches, lambda score: has_signal(score.rewards))
    return {"groups": groups, "metrics": metrics, "position": position, "draws": draws}


@pytest.fixture(scope="module")
def places(material):
    return str(material["tiny"]), str(material["data"])


@pytest.fixture(scope="module")
def alone(places):
    return run_ranks(1, refilled, *places, 1, 1, 20)[0]


def test_every_group_has_a_signal_while_prompts_last(alone, places):
    unfilled = run_ranks(1, refilled, *places, 1, 1, 0)[0]
    signals = [signal for _, signal in unfilled["groups"].values()]
    assert unfilled["draws"] == [] and unfilled["position"] == NUM_PROMPTS and 0 < sum(signals) < NUM_PROMPTS
    assert len(alone["groups"]) == NUM_PROMPTS and all(signal for _, signal in alone["groups"].values())
    kept = {key: group for key, group in unfilled["groups"].items() if group[1]}
    assert kept.items() <= alone["groups"].items(), "a group with signal must stay"
    assert alone["draws"][0] == NUM_PROMPTS - sum(signals) and alone["draws"] == sorted(alone["draws"], reverse=True)
    sampled = NUM_PROMPTS + sum(alone["draws"])
    assert alone["position"] == alone["metrics"]["refill/num_prompts"] == sampled
    assert alone["metrics"]["refill/frac_reward_zero_std"] == pytest.approx(1 - NUM_PROMPTS / sampled)


def test_the_last_round_may_leave_groups_without_signal(alone, places):
    once = run_ranks(1, refilled, *places, 1, 1, 1)[0]
    assert len(once["groups"]) == NUM_PROMPTS and len(once["draws"]) == 1
    assert sum(not signal for _, signal in once["groups"].values()) == alone["draws"][1]


@pytest.mark.parametrize("tensor, pipeline", [(1, 1), (2, 1), (1, 2)], ids=["dp2", "tp2", "pp2"])
def test_ranks_replace_the_same_groups_by_the_same_prompts(alone, places, tensor, pipeline):
    parts = run_ranks(2, refilled, *places, tensor, pipeline, 20)
    groups = {key: group for part in parts for key, group in part["groups"].items()}
    assert groups == alone["groups"]
    for part in parts:
        assert len(part["groups"]) == NUM_PROMPTS // (2 // (tensor * pipeline))
        assert (part["draws"], part["position"]) == (alone["draws"], alone["position"])
        assert part["metrics"] == pytest.approx(alone["metrics"])
