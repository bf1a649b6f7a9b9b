"""Adaptive noise without a model: what is sampled again, who is asked for it, and what is counted."""

from dataclasses import replace
from types import SimpleNamespace

import torch

from megatron_ral.config import RunConfig
from megatron_ral.config.sections import AttentionNoiseConfig, RolloutConfig
from megatron_ral.engine.pipelined_decoder import PromptResponses
from megatron_ral.rollout import collect
from megatron_ral.rollout.lengths import MicroBatchSettings
from megatron_ral.rollout.metrics import resampling_metrics
from megatron_ral.rollout.refill import ScoredGroups, refill
from megatron_ral.rollout.resample import Resampling, resample
from megatron_ral.rollout.sampler import SampledBatch
from megatron_ral.rollout.settings import RolloutSettings
from megatron_ral.types import ResponseBatch, Score, pad_prompts
from tests.unit.test_rollout import ENGINE, PROCESSOR, prompt

G, R = 2, 4


def answers(prompts):
    shape = (len(prompts), G, R)
    return ResponseBatch(
        pad_prompts(prompts, 0),
        torch.zeros(shape, dtype=torch.int64),
        torch.full(shape[:2], R),
        torch.zeros(shape),
        torch.ones(shape[:2], dtype=torch.bool),
    )


class Sampler:
    """Sampler that notes which prompts it is asked for, with which noise and key."""

    def __init__(self):
        self.asked = []

    def sample(self, prompts, settings, batch_size, *identity):
        prompts = list(prompts)
        if prompts:
            self.asked.append(([p.sample.key for p in prompts], settings.exploration.sigma, identity))
            yield SampledBatch(answers(prompts), None, (0,) * len(prompts))

    def encode_visual(self, prompts, pad_token_id):
        return None


class Teacher:
    """Teacher for which all ranks have to come together."""

    shape = SimpleNamespace(vocab_size=9)

    def __init__(self):
        self.calls = []

    def answer(self, prompts, settings, batch_size, *identity):
        self.calls.append([p.sample.key for p in prompts])
        return PromptResponses.split(answers(prompts)) if prompts else []


def scored(count, accuracy=0.0):
    return Score(
        torch.zeros(count, G),
        {"accuracy": torch.full((count, G), accuracy)},
        (("",) * G,) * count,
        (((),) * G,) * count,
    )


def rolled_out(monkeypatch, sigma, adaptive, teacher=None, share=0.0):
    monkeypatch.setattr(collect, "score_responses", lambda responses, *arguments: scored(len(responses.prompts)))
    config = RunConfig(
        rollout=RolloutConfig(
            num_prompts=8,
            group_size=G,
            num_minibatches=1,
            max_response_length=R,
            attention_noise=AttentionNoiseConfig(sigma=sigma, adaptive=adaptive),
        )
    )
    settings = replace(RolloutSettings.from_config(config), teacher_rollouts=share)
    sampler = Sampler()
    shape = SimpleNamespace(**vars(ENGINE.shape), vocab_size=9)
    engine = SimpleNamespace(**{**vars(ENGINE), "shape": shape})
    prompts = [prompt(f"prompt {index}") for index in range(8)]
    rollout = collect.collect_rollout(engine, sampler, prompts, PROCESSOR, settings, 0, MicroBatchSettings(8), teacher)
    return sampler.asked, rollout


def test_without_noise_nothing_is_sampled_again(monkeypatch):
    """The warning says that the setting has no effect then."""
    asked, rollout = rolled_out(monkeypatch, sigma=0.0, adaptive=2)
    assert [(len(keys), identity) for keys, _, identity in asked] == [(8, (0, 0))]
    assert rollout.resampling.failed == 0


def test_each_attempt_has_twice_the_noise_and_draws_of_its_own(monkeypatch):
    asked, rollout = rolled_out(monkeypatch, sigma=3.0, adaptive=2)
    assert [(len(keys), sigma, identity) for keys, sigma, identity in asked] == [
        (8, 3.0, (0, 0)),
        (8, 6.0, (0, 0, "attempt", 1)),
        (8, 12.0, (0, 0, "attempt", 2)),
    ]
    assert rollout.resampling == Resampling(tried=8, failed=8, rescued=0)


def test_a_teacher_is_asked_once_because_all_ranks_come_to_it_together(monkeypatch):
    """A rank that has nothing to sample again would not come to a second call."""
    teacher = Teacher()
    asked, rollout = rolled_out(monkeypatch, sigma=3.0, adaptive=2, teacher=teacher, share=0.5)
    [taught] = teacher.calls
    own = [f"prompt {index}" for index in range(8) if f"prompt {index}" not in taught]
    assert taught and own and [sorted(keys) for keys, *_ in asked] == [own] * 3
    assert rollout.resampling == Resampling(tried=len(own), failed=len(own), rescued=0)


def test_shares_are_of_all_prompts_that_were_sampled(monkeypatch):
    """A refill round replaces all four groups: 8 of 8 prompts fail, and 4 of them are rescued, but by equal rewards."""
    found, calls = Resampling(), []

    def attempt(prompts, number):
        calls.append((len(prompts), number))
        count = len(prompts)
        return ScoredGroups(
            list(prompts),
            PromptResponses.split(answers(prompts)),
            [None] * count,
            [False] * count,
            [0] * count,
            scored(count, accuracy=float(len(calls) == 2)),
        )

    def answer(prompts):
        return resample(attempt(prompts, 0), attempt, 1, found)

    monkeypatch.setattr("megatron_ral.rollout.refill.gather_objects", lambda value, group: [value])
    alone = SimpleNamespace(layout=SimpleNamespace(data_rank=0, data_size=1), data=None)
    groups, _ = refill(
        answer([prompt(f"a{i}") for i in range(4)]),
        answer,
        lambda slots: {slot: prompt(f"b{slot}") for slot in slots},
        1,
        alone,
    )
    assert [item.sample.key for item in groups.prompts] == ["b0", "b1", "b2", "b3"]
    assert calls == [(4, 0), (4, 1), (4, 0), (4, 1)] and found == Resampling(tried=8, failed=8, rescued=4)
    monkeypatch.setattr("megatron_ral.rollout.metrics.sum_metrics", lambda sums, process_groups: dict(sums))
    policy = SimpleNamespace(layout=SimpleNamespace(is_last_stage=True), process_groups=alone)
    shares = resampling_metrics(found, policy)
    assert shares == {"attention_noise/failed": 1.0, "attention_noise/rescued": 0.5}
    assert resampling_metrics(Resampling(), policy) == {}, "a teacher answered all prompts"
