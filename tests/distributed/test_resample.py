"""Adaptive noise: prompts without a right response are sampled again with twice the noise, on any number of ranks."""

import dataclasses
import zlib

import pytest
import torch

from megatron_ral.attention.exploration import AttentionNoise
from megatron_ral.config.sections import AttentionNoiseConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.models.shape import read_shape
from megatron_ral.parallel.process_groups import start_groups, stop_groups
from megatron_ral.rollout import collect
from megatron_ral.rollout.lengths import MicroBatchSettings
from megatron_ral.rollout.metrics import resampling_metrics
from megatron_ral.rollout.native_sampler import NativeSampler
from megatron_ral.rollout.settings import RolloutSettings
from megatron_ral.training.build import build_policy
from tests.distributed.cases import make_config, open_loader, responses_by_prompt
from tests.distributed.runner import run_ranks

NUM_PROMPTS = 8
SIGMA = 3.0


def resampled(path: str, data: str, tensor: int, pipeline: int, adaptive: int) -> dict:
    config = make_config(path, tensor=tensor, pipeline=pipeline)
    noise = AttentionNoiseConfig(sigma=SIGMA, adaptive=adaptive)
    config = dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, attention_noise=noise, max_response_length=4)
    )
    process_groups = start_groups(tensor_size=tensor, pipeline_size=pipeline, seed=0)
    policy = build_policy(config, read_shape(path), process_groups)
    processor, score = PromptProcessor(path, 128), collect.score_responses

    def rarely_right(*arguments):
        """One response in 16 is right, so that of three groups two have none."""
        found = score(*arguments)
        right = [[float(zlib.crc32(text.encode()) % 16 == 0) for text in group] for group in found.texts]
        return dataclasses.replace(found, components={**found.components, "accuracy": torch.tensor(right)})

    sigmas: list[list] = []
    draw_noise = AttentionNoise.draw.__func__

    def watched(cls, prompts, group_size, settings, *identity):
        sigmas.append([settings.sigma, len(prompts)])
        return draw_noise(cls, prompts, group_size, settings, *identity)

    collect.score_responses = rarely_right
    AttentionNoise.draw = classmethod(watched)
    loader = open_loader(f"{data}/rl-*.tar", processor, process_groups)
    rollout = collect.collect_rollout(
        policy,
        NativeSampler(policy),
        loader.take(NUM_PROMPTS),
        processor,
        RolloutSettings.from_config(config),
        0,
        MicroBatchSettings(2),
    )
    metrics = resampling_metrics(rollout.resampling, policy)
    stop_groups()
    groups = responses_by_prompt(rollout.batches, lambda score: (score.components["accuracy"] >= 0.5).any(dim=1))
    return {"groups": groups, "metrics": metrics, "sigmas": sigmas}


@pytest.fixture(scope="module")
def places(material):
    return str(material["tiny"]), str(material["data"])


@pytest.fixture(scope="module")
def alone(places):
    return run_ranks(1, resampled, *places, 1, 1, 3)[0]


def test_only_prompts_without_a_right_response_are_sampled_again(alone, places):
    once = run_ranks(1, resampled, *places, 1, 1, 0)[0]
    failed = {key for key, (_, right) in once["groups"].items() if not right}
    assert 0 < len(failed) < NUM_PROMPTS and {sigma for sigma, _ in once["sigmas"]} == {SIGMA}
    for key, group in once["groups"].items():
        assert (alone["groups"][key] != group) == (key in failed), "a group with a right response must stay"
    still = sum(not right for _, right in alone["groups"].values())
    assert still < len(failed)
    assert alone["metrics"] == {
        "attention_noise/failed": len(failed) / NUM_PROMPTS,
        "attention_noise/rescued": (len(failed) - still) / NUM_PROMPTS,
    }


def test_the_noise_doubles_with_every_attempt(alone):
    sampled = {sigma: sum(count for other, count in alone["sigmas"] if other == sigma) for sigma, _ in alone["sigmas"]}
    assert list(sampled)[:3] == [SIGMA, 2 * SIGMA, 4 * SIGMA]
    counts = list(sampled.values())
    assert counts[0] == NUM_PROMPTS and counts[1] == alone["metrics"]["attention_noise/failed"] * NUM_PROMPTS
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("tensor, pipeline", [(1, 1), (2, 1), (1, 2)], ids=["dp2", "tp2", "pp2"])
def test_ranks_sample_the_same_groups_again(alone, places, tensor, pipeline):
    parts = run_ranks(2, resampled, *places, tensor, pipeline, 3)
    groups = {key: group for part in parts for key, group in part["groups"].items()}
    assert groups == alone["groups"]
    for part in parts:
        assert part["metrics"] == pytest.approx(alone["metrics"])
