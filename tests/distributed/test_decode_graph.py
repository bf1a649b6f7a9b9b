"""A decoding pass that is recorded once and replayed, as a GPU does it, against the same pass from Python."""

import pytest
import torch

from megatron_ral.attention.exploration import ExplorationSettings
from megatron_ral.engine import decoding_batch
from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.engine.pipelined_decoder import sample_responses
from megatron_ral.models.kv_cache import GroupKVCache
from megatron_ral.parallel.process_groups import stop_groups
from tests.distributed.cases import open_policy
from tests.distributed.recorded_operations import RecordedOperations
from tests.distributed.runner import run_ranks
from tests.distributed.test_generation import CASES, IDENTITY, R, make_settings, read

NOISE = ExplorationSettings(sigma=4.0, noisy_layers=frozenset(range(8)))
NOISE_AND_ROWS = ExplorationSettings(sigma=4.0, noisy_layers=frozenset(range(8)), recorded_layers=frozenset({0, 1}))


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
            plain = [batch for batch, _ in sample_responses(policy, prompts, sampling, 3, *IDENTITY)]
            RecordedOperations.made = RecordedOperations.replays = 0
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(decoding_batch, "Recorded", RecordedOperations)
                patch.setattr(decoding_batch, "can_record", lambda device: True)
                recorded = [batch for batch, _ in sample_responses(policy, prompts, sampling, 3, *IDENTITY)]
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
