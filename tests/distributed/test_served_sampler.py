"""Responses from a server around stock transformers: those of the native sampler, on every rank, whatever fails."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from megatron_ral.config.sections import ViewsConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.errors import UserError
from megatron_ral.parallel.process_groups import stop_groups
from megatron_ral.rollout.native_sampler import NativeSampler
from megatron_ral.rollout.served.sampler import ServedSampler
from megatron_ral.rollout.served.settings import ServedSettings
from megatron_ral.rollout.views import sample_views
from tests.distributed.cases import assemble, fixed_groups, micro_batches, open_policy
from tests.distributed.runner import run_ranks

ENGINE = Path(__file__).parents[1] / "stock_engine.py"
COUNTS = ("num_pushes", "num_failures", "num_foreign_samples", "probe_difference", "owns")
SAMPLING = SamplingSettings(3, 7, end_token_id=323, pad_token_id=321)
"""End token and padding of the tiny models."""


def served_settings(path: str, folder: str, *, seconds: float = 100.0, **options) -> ServedSettings:
    return ServedSettings(
        sys.executable,
        str(ENGINE),
        {"model": path, "version": "1", **options},
        ("1",),
        Path(folder),
        request_seconds=seconds,
        start_seconds=200.0,
        bucket_bytes=1 << 18,
        probe_bound=1e-3,
    )


def train(opened, rollout) -> None:
    """One optimizer step."""
    config, process_groups, _, policy, objective = opened
    [minibatch] = assemble(rollout, [None], None, None, objective, config, process_groups)
    policy.forward_backward(minibatch, objective)
    policy.step()


def responses(sampler, prompts, *identity) -> list[torch.Tensor]:
    batches = [batch.responses for batch in sampler.sample(prompts, SAMPLING, 2, *identity)]
    return [
        part
        for batch in batches
        for part in (batch.response_ids, batch.response_lengths, batch.finished, batch.rollout_logprobs)
    ]


def views(sampler, prompts, *identity) -> list[torch.Tensor]:
    """Responses to partial views, which are prompts of their own."""
    rows = sample_views(sampler, prompts, SAMPLING, ViewsConfig(0.5), frozenset(), 4, *identity)
    return [
        part for row in rows for part in (row.response_ids, row.response_lengths, row.finished, row.rollout_logprobs)
    ]


def open_sampler(path: str, tensor: int, pipeline: int, folder: str, **options):
    opened = open_policy(
        path, tensor, pipeline, kl_coef=0.0, attention_target="hindsight", attention_keys="prompt", learning_rate=1e-2
    )
    processor = PromptProcessor(path, 128)
    return opened, ServedSampler(opened[3], processor, served_settings(path, folder, **options))


def both_samplers(path: str, data: str, tensor: int, pipeline: int, folder: str, options: dict) -> dict:
    """Responses of the server and of the native sampler before and after an update."""
    opened, sampler = open_sampler(path, tensor, pipeline, folder, **options)
    policy = opened[3]
    prompts = [row[0] for row in fixed_groups(path, data)[:3]]
    rollout = micro_batches(fixed_groups(path, data)[:2], 2, policy)
    found = {"served": [], "native": [], "pid": sampler.client.pid if sampler.client else 0}
    for number in range(2):
        found["served"].append(responses(sampler, prompts, 7, number))
        found["native"].append(responses(NativeSampler(policy), prompts, 7, number))
        for name, source in (("served", sampler), ("native", NativeSampler(policy))):
            found[name][-1] += views(source, prompts[:2], 7, number)
        if number == 0:
            train(opened, rollout)
    found |= {name: getattr(sampler, name) for name in COUNTS}
    sampler.close()
    stop_groups()
    return found


def check_equal(results, *, tolerance=2e-5):
    """Tokens of the native sampler on every rank, and its log-probabilities but for the rounding of two engines."""
    for result in results:
        for served, native, first in zip(result["served"], result["native"], results[0]["served"]):
            assert len(served) == len(native) == 16, "two batches, and views of two prompts"
            for index, (one, other) in enumerate(zip(served, native)):
                if index % 4 < 3:
                    assert torch.equal(one, other)
                else:
                    assert (one - other).abs().max() <= tolerance
            assert all(torch.equal(one, other) for one, other in zip(served, first)), "alike on every rank"
    first, second = results[0]["served"]
    assert not torch.equal(first[3], second[3]), "the update has moved the policy"


@pytest.mark.parametrize("world, tensor, pipeline", [(1, 1, 1), (2, 2, 1), (4, 1, 2)])
def test_every_rank_gets_the_responses_of_the_native_sampler(material, tmp_path, world, tensor, pipeline):
    arguments = str(material["tiny"]), str(material["data"]), tensor, pipeline, str(tmp_path), {}
    results = run_ranks(world, both_samplers, *arguments)
    check_equal(results)
    owners = [result for result in results if result["owns"]]
    assert len(owners) == world // (tensor * pipeline) == len({result["pid"] for result in owners})
    for result in results:
        assert (result["num_pushes"], result["num_failures"]) == (2, 0) and bool(result["pid"]) == result["owns"]
        assert result["probe_difference"] <= 2e-5


@pytest.mark.parametrize("fault, seconds", [("dies", 100.0), ("dies in a push", 100.0), ("stalls", 20.0)])
def test_one_failure_costs_time_and_changes_nothing(material, tmp_path, fault, seconds):
    """Of two prompts the first is answered before the server dies; a stalled request is given up after 20 s."""
    options = {"faults": [fault], "once": str(tmp_path / "failed"), "seconds": seconds}
    arguments = str(material["tiny"]), str(material["data"]), 2, 1, str(tmp_path), options
    results = run_ranks(2, both_samplers, *arguments)
    check_equal(results)
    for result in results:
        assert result["num_failures"] == 1 and result["num_foreign_samples"] == 0
        assert result["num_pushes"] == (3 if fault == "dies" else 2)
    assert (tmp_path / "failed").exists()


def foreign_answers(path: str, data: str, folder: str) -> tuple:
    """Responses, counts, and responses of the native sampler, where the first answers are of other weights."""
    opened, sampler = open_sampler(path, 1, 1, folder)
    client, prompts = sampler.client, [row[0] for row in fixed_groups(path, data)[:2]]
    original, requests = client.sample, []

    def sample(request, version, seconds, take, warms_up=False):
        requests.append(len(request.sizes))
        if requests == [1, 1, 2]:  # warm-up and probe before it
            plain, take = take, lambda number, group: plain(number, dataclasses.replace(group, version=version - 1))
        original(request, version, seconds, take, warms_up)

    client.sample = sample
    found = responses(sampler, prompts, 7, 0)
    counts = sampler.num_foreign_samples, sampler.num_failures, sampler.num_pushes
    sampler.close()
    native = responses(NativeSampler(opened[3]), prompts, 7, 0)
    stop_groups()
    return found, native, counts, requests


def test_responses_of_other_weights_are_dropped_counted_and_sampled_again(material, tmp_path):
    arguments = str(material["tiny"]), str(material["data"]), str(tmp_path)
    [(found, native, counts, requests)] = run_ranks(1, foreign_answers, *arguments)
    assert counts == (6, 1, 2), "responses to two prompts were dropped; the server was started again with all weights"
    assert requests == [1, 1, 2, 1, 1, 2]
    assert all(torch.equal(one, other) for one, other in zip(found[:3], native[:3]))


def refusal(path: str, data: str, tensor: int, folder: str, options: dict) -> str:
    """Error of a sampler of which something is wrong from the start."""
    try:
        _, sampler = open_sampler(path, tensor, 1, folder, **options)
        prompts = [row[0] for row in fixed_groups(path, data)[:2]]
        responses(sampler, prompts, 7, 0)
        return "nothing was noticed"
    except UserError as error:
        return f"{type(error).__name__} {error}"
    finally:
        stop_groups()


@pytest.mark.parametrize("fault", ["old head", "old features", "pixels as they are"])
def test_what_goes_wrong_silently_in_an_engine_is_seen_by_the_first_probe(material, tmp_path, fault):
    """A server starts with random weights, which its caches have seen: the first push has to clear all of them."""
    arguments = str(material["tiny"]), str(material["data"]), 1, str(tmp_path), {"faults": [fault]}
    [said] = run_ranks(1, refusal, *arguments)
    assert "AgreedError rollout.sampler = vllm answers a probe with other log-probabilities" in said, said
    assert float(said.split("they differ by ")[1].split()[0]) > 1e-3
    assert "more than rollout.vllm.probe_bound = 0.001; nothing was trained" in said


def test_a_second_failure_ends_every_rank_with_one_message(material, tmp_path):
    arguments = str(material["tiny"]), str(material["data"]), 2, str(tmp_path), {"faults": ["dies in a push"]}
    one, other = run_ranks(2, refusal, *arguments)
    assert one == other and "rollout.sampler = vllm failed twice in one rollout: " in one
    assert one.count("signal 9 ended it") == 2 and str(tmp_path) in one


def test_an_engine_of_another_version_is_refused(material, tmp_path):
    arguments = str(material["tiny"]), str(material["data"]), 2, str(tmp_path), {"version": "2"}
    one, other = run_ranks(2, refusal, *arguments)
    assert one == other and "has stock 2, which was not tried; install 1" in one
