"""A decoding pass that is recorded once and replayed, as a GPU does it, against the same pass from Python, and that
against the step of its own that the CPU has."""

import pytest
import torch

from megatron_ral.attention.exploration import ExplorationSettings
from megatron_ral.engine import decoding_batch
from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.engine.pipelined_decoder import sample_responses
from megatron_ral.models.host_decoding import HostDecoding
from megatron_ral.models.kv_cache import GroupKVCache
from megatron_ral.parallel.process_groups import stop_groups
from tests.distributed.cases import open_policy
from tests.distributed.recorded_operations import RecordedOperations
from tests.distributed.runner import run_ranks
from tests.distributed.test_generation import CASES, IDENTITY, R, make_settings, read

NOISE = ExplorationSettings(sigma=4.0, noisy_layers=frozenset(range(8)))
NOISE_AND_ROWS = ExplorationSettings(sigma=4.0, noisy_layers=frozenset(range(8)), recorded_layers=frozenset({0, 1}))


class FromPython:
    """Stand-in for `engine.decode_graph.Recorded` that runs the work from Python every time."""

    def __init__(self, work):
        self.work = work

    def __call__(self):
        return self.work()


def as_on_a_gpu(recorded, *arguments):
    """Return the batches that passes of the modules give, repeated by a stand-in for `Recorded`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding_batch, "Recorded", recorded)
        patch.setattr(decoding_batch, "can_record", lambda device: True)
        return [batch for batch, _ in sample_responses(*arguments)]


def both(path, tensor, pipeline):
    """Return whether recorded passes give the bits of plain ones, and how often they were recorded and replayed."""
    GroupKVCache.BLOCK = 5
    policy, prompts = open_policy(path, tensor, pipeline)[3], read(path)
    result = {}
    with policy.resident():
        settings = {
            "noise": SamplingSettings(3, R, -1, 0, exploration=NOISE),
            "rows": SamplingSettings(3, R, -1, 0, exploration=NOISE_AND_ROWS),
            "rows of responses that end": SamplingSettings(4, R, 7, 0, num_tokens=10, exploration=NOISE_AND_ROWS),
        }
        if tensor == pipeline == 1:
            settings |= {name: make_settings(policy, prompts, case) for name, case in CASES.items()}
        else:
            settings |= {"free": SamplingSettings(3, R, -1, 0), "ends": SamplingSettings(4, R, 7, 0, num_tokens=10)}
        for name, sampling in settings.items():
            arguments = policy, prompts, sampling, 3, *IDENTITY
            plain = as_on_a_gpu(FromPython, *arguments)
            RecordedOperations.made = RecordedOperations.replays = 0
            recorded = as_on_a_gpu(RecordedOperations, *arguments)
            equal = all(
                torch.equal(mine.response_ids, theirs.response_ids)
                and torch.equal(mine.rollout_logprobs, theirs.rollout_logprobs)
                and mine.attention.keys() == theirs.attention.keys()
                and all(torch.equal(mine.attention[layer], theirs.attention[layer]) for layer in mine.attention)
                for mine, theirs in zip(plain, recorded, strict=True)
            )
            result[name] = equal, RecordedOperations.made, RecordedOperations.replays
    stop_groups()
    return result


@pytest.mark.parametrize("world, tensor, pipeline", [(1, 1, 1), (2, 2, 1), (2, 1, 2)])
def test_a_replayed_pass_equals_the_plain_one_bit_for_bit(material, world, tensor, pipeline):
    for found in run_ranks(world, both, str(material["tiny"]), tensor, pipeline):
        for name, (equal, made, replays) in found.items():
            assert equal, name
            assert made >= 2 and replays > made, (name, made, replays)


def on_the_host(path, tensor, pipeline, adapter):
    """Return the largest differences between the CPU's own step and the modules, and how often the step ran."""
    policy, prompts = open_policy(path, tensor, pipeline, adapter=adapter)[3], read(path)
    if adapter is not None:  # as after some updates
        with torch.no_grad(), policy.resident():
            for name, parameter in policy.stage.named_parameters():
                if name.endswith("adapter.B"):
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    steps, result, step = 0, {}, HostDecoding.__call__

    def count(*arguments):
        nonlocal steps
        steps += 1
        return step(*arguments)

    sampling = {
        "free": SamplingSettings(3, R, -1, 0, num_tokens=60),
        "ends": SamplingSettings(4, R, 7, 0, num_tokens=10),
        "noise and rows": SamplingSettings(4, R, 7, 0, num_tokens=10, exploration=NOISE_AND_ROWS),
    }
    with policy.resident(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostDecoding, "__call__", count)
        for name, settings in sampling.items():
            arguments = policy, prompts, settings, 3, *IDENTITY
            modules = as_on_a_gpu(FromPython, *arguments)
            assert steps == 0
            pairs = list(zip([batch for batch, _ in sample_responses(*arguments)], modules, strict=True))
            assert all(torch.equal(a.response_ids, b.response_ids) for a, b in pairs), name
            difference = max(float((a.rollout_logprobs - b.rollout_logprobs).abs().max()) for a, b in pairs)
            rows = [0.0]
            for a, b in pairs:
                assert a.attention.keys() == b.attention.keys()
                # Behind a response's end there is what was fed until its row was dropped, which a recording defers.
                own = torch.arange(a.response_ids.shape[2]) < a.response_lengths[..., None]
                rows += [float((a.attention[layer] - b.attention[layer])[own].abs().max()) for layer in a.attention]
            result[name] = difference, max(rows), steps
            steps = 0
    stop_groups()
    return result


@pytest.mark.parametrize(
    "kind, world, tensor, pipeline, adapter",
    [
        ("tiny", 1, 1, 1, None),
        ("tiny", 4, 2, 2, None),
        ("tiny", 2, 2, 1, {"rank": 4}),
        ("qwen3", 2, 2, 1, None),
        ("internvl", 1, 1, 1, None),
    ],
)
def test_the_step_of_the_cpu_draws_what_the_modules_draw(material, kind, world, tensor, pipeline, adapter):
    """Float32: log-probabilities near -4 have a spacing of 4e-7."""
    for found in run_ranks(world, on_the_host, str(material[kind]), tensor, pipeline, adapter):
        for name, (logprobs, rows, steps) in found.items():
            assert logprobs < 1e-5 and rows < 1e-5, (name, logprobs, rows)
            assert steps >= R - 1, name


def test_layers_with_a_state_keep_their_modules(material):
    for found in run_ranks(1, fits, str(material["qwen3_5"])):
        assert found is False


def fits(path):
    policy = open_policy(path, 1, 1)[3]
    result = HostDecoding.fits(policy.stage)
    stop_groups()
    return result
