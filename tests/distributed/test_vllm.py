"""vLLM itself as the sampler: `bash tests/run.sh -m vllm` with VLLM_PYTHON or the environment of setup_vllm.sh."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron_ral.data.processor import PromptProcessor
from megatron_ral.errors import UserError
from megatron_ral.parallel.process_groups import stop_groups
from megatron_ral.rollout.served.sampler import ServedSampler
from megatron_ral.rollout.served.settings import ENGINE, ServedSettings
from megatron_ral.types import GroupBatch
from tests.distributed.cases import fixed_groups, micro_batches, open_policy
from tests.distributed.runner import run_ranks
from tests.distributed.test_served_sampler import SAMPLING, train

PYTHON = os.environ.get("VLLM_PYTHON") or str(Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not os.access(PYTHON, os.X_OK), reason="no environment with vLLM (launch_scripts/setup_vllm.sh)"
    ),
]


ASIDE = " Which digit is it?"
"""Text that makes prompts longer than two blocks of the prefix cache."""


def rollouts(path: str, data: str, tensor: int, folder: str, engine: str) -> dict | str:
    """Differences of log-probabilities between vLLM and the policy over two updates, or the error that ends the run."""
    opened = open_policy(
        path, tensor, 1, kl_coef=0.0, attention_target="hindsight", attention_keys="prompt", learning_rate=1e-2
    )
    policy, rows = opened[3], fixed_groups(path, data)
    options = {"model": path, "dtype": "float32", "max_length": 256, "max_sequences": 32, "temperature": 1.0}
    settings = ServedSettings(
        PYTHON,
        engine,
        {**options, "memory_share": 0.05},
        ("0.32.0",),
        Path(folder),
        request_seconds=200.0,
        start_seconds=300.0,
        bucket_bytes=1 << 18,
        probe_bound=1e-3,
    )
    processor = PromptProcessor(path, 128)
    sampler = ServedSampler(policy, processor, settings)
    samples = [dataclasses.replace(row[0].sample, problem=row[0].sample.problem + 6 * ASIDE) for row in rows]
    prompts, found = [processor(sample) for sample in samples], {"differences": [], "tokens": [], "again": []}
    try:
        for number in range(3):
            for batch in sampler.sample(prompts, SAMPLING, 4, 7, number):
                given = batch.responses
                own = policy.forward([GroupBatch(given.prompts, given.response_ids, given.response_lengths)])[0]
                mask = torch.arange(given.response_ids.shape[2]) < given.response_lengths[..., None]
                found["differences"].append((own.tokens.logprobs - given.rollout_logprobs).abs()[mask])
                found["tokens"].append(given.response_ids)
            again = [batch.responses.response_ids for batch in sampler.sample(prompts, SAMPLING, 4, 7, number)]
            found["again"] += again
            if number < 2:
                train(opened, micro_batches(rows[:2], 2, policy))
        found |= {"pushes": sampler.num_pushes, "failures": sampler.num_failures, "probe": sampler.probe_difference}
        return found
    except UserError as error:
        return str(error)
    finally:
        sampler.close()
        stop_groups()


@pytest.mark.parametrize("kind, tensor", [("tiny", 1), ("untied", 2), ("qwen3", 1)])
def test_logprobs_are_the_policys_after_every_push_and_seeds_decide(material, tmp_path, kind, tensor):
    """Float32, two engines: a token's log-probability is near -6, where the spacing of float32 is 5e-7."""
    arguments = str(material[kind]), str(material["data"]), tensor, str(tmp_path), str(ENGINE)
    for found in run_ranks(tensor, rollouts, *arguments):
        assert not isinstance(found, str), found
        assert (found["pushes"], found["failures"]) == (3, 0) and found["probe"] < 1e-5
        differences = torch.cat(found["differences"])
        assert len(differences) > 400 and differences.mean() < 3e-6 and differences.max() < 3e-5
        assert all(torch.equal(one, other) for one, other in zip(found["tokens"], found["again"]))
        assert len({tuple(row.tolist()) for ids in found["tokens"] for row in ids.flatten(0, 1)}) > 60


SMALL_BLOCKS = ("seed=0,", "seed=0, block_size=32,")
"""Blocks of the prefix cache that these short prompts fill. On processors they have 128 tokens."""
PLANTED = {
    "old head": [("module.quant_method.process_weights_after_loading(module)", "pass")],
    "old features": [("self.engine.reset_encoder_cache()", "pass")],
    "old prefixes": [("if not self.engine.reset_prefix_cache():", "if False:"), SMALL_BLOCKS],
    "random constants": [("        only_parameters_are_random()\n", "")],
    "normalised pixels": [
        ("torch.from_numpy(prompt.patches.copy())", "torch.from_numpy(prompt.patches / 127.5 - 1.0)")
    ],
}
"""Texts that stand in the engine, and those that are put in their places."""


@pytest.mark.parametrize("name", PLANTED)
def test_what_goes_wrong_silently_is_seen_by_the_first_probe(material, tmp_path, name):
    source = ENGINE.read_text()
    for right, wrong in PLANTED[name]:
        assert source.count(right) == 1, right
        source = source.replace(right, wrong)
    broken = tmp_path / "broken_engine.py"
    broken.write_text(source)
    [said] = run_ranks(1, rollouts, str(material["tiny"]), str(material["data"]), 1, str(tmp_path), str(broken))
    assert isinstance(said, str), f"nothing was noticed: {said}"
    assert "answers a probe with other log-probabilities than the policy" in said, said


def test_rotary_axes_that_vllm_misreads_are_seen_by_the_first_probe(material, tmp_path):
    """`check_served` refuses such a folder before; transformers alternates the axes in any case."""
    folder = tmp_path / "model"
    shutil.copytree(material["qwen3"], folder)
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]["rope_parameters"]["mrope_interleaved"]
    (folder / "config.json").write_text(json.dumps(config))
    [said] = run_ranks(1, rollouts, str(folder), str(material["data"]), 1, str(tmp_path), str(ENGINE))
    assert isinstance(said, str), f"nothing was noticed: {said}"
    assert "answers a probe with other log-probabilities than the policy" in said, said
