"""Steps of real runs that are not finite are skipped, stored, and reproduced by the command in the log."""

import json
import re
import shutil

import torch
from safetensors.torch import load_file

from megatron_ral.data.loader import open_sources
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.evaluation.prompt_set import read_prompts
from megatron_ral.weights.conversion import differing_weights
from tests.faults.launch import run_job
from tests.integration.cases import RL, SFT, write_config


def rare_token(model, shard) -> tuple[int, int]:
    """Return (a token that only one sample of a shard contains, the number of that sample)."""
    processor = PromptProcessor(str(model), 128)
    prompts = read_prompts(open_sources([(str(shard), 0)], "data.train")[0].shards, processor, 16)
    read = [set(prompt.input_ids.tolist()) | set(prompt.response_ids[:-1].tolist()) for prompt in prompts]
    for token in sorted(set().union(*read)):
        samples = [number for number, tokens in enumerate(read) if token in tokens]
        if len(samples) == 1:
            return token, samples[0]
    raise AssertionError("no token is in one sample alone")


def replay_of(log: str) -> list[str]:
    """Return the arguments of megatron_ral.replay in the command of a log."""
    return re.findall(r"-m torch\.distributed\.run --standalone --nproc-per-node 2 -m megatron_ral\.replay (\S+)", log)


def test_damaged_weight_that_one_sample_meets(material, tmp_path):
    """An embedding row that becomes NaN spoils the step of the one sample with that token, and no other step."""
    model, shard = material["untied"], material["data"] / "search-000000.tar"
    token, number = rare_token(model, shard)
    path, overrides = write_config(tmp_path, SFT, model, material["data"])
    ended = run_job(
        2,
        tmp_path / "job",
        [
            str(token),
            "--config",
            path,
            *overrides,
            f"data.train=[{{shards: '{shard}'}}]",
            "data.shuffle=false",
            "train.num_steps=2",
            f"train.output_dir={tmp_path}/run",
        ],
        module="tests.faults.damage",
    )
    assert ended.codes == [0, 0], ended.output
    spoilt = number // 8 + 1  # of 2 steps with 8 samples
    log = ended.output[0]
    assert f"step {spoilt}: a loss or the gradient was not finite" in log and f"step {3 - spoilt}: a loss" not in log
    states = {step: load_file(tmp_path / f"run/checkpoints/step_{step:08d}/rank_00000.safetensors") for step in (1, 2)}
    assert states[2]["adamw_step"] == 1
    if spoilt == 2:
        assert all(
            torch.equal(states[1][key], states[2][key]) or not states[1][key].isfinite().all() for key in states[1]
        )
    [folder] = replay_of(log)
    assert (
        json.loads((tmp_path / "run/replay" / f"step_{spoilt:08d}_update_001" / "replay.json").read_text())["step"]
        == spoilt
    )
    again = run_job(2, tmp_path / "again", [folder], module="megatron_ral.replay")
    report = again.output[0]
    assert again.codes == [0, 0] and "reproduced: the loss or the gradient is not finite" in report, report
    found = [line for line in report.splitlines() if line.startswith("in the passes: ")]
    assert found and all("search-000000.tar/" in line for line in found)
    [logprobs] = [line for line in found if ": log-probabilities, sample " in line]
    assert f"data rank {number % 8 % 2}, micro-batch " in logprobs and logprobs.count("search-") == 1, logprobs
    assert f"/search_{number:06d}" in logprobs, logprobs
    micro_batch = int(logprobs.partition("micro-batch ")[2].partition(":")[0])  # in which one depends on lengths
    assert micro_batch in (0, 1)
    assert "weights that are not finite, 1: language.embedding.word_embeddings.weight" in report
    assert f"micro-batch {micro_batch} of every data rank alone: loss = nan" in report
    assert f"micro-batch {1 - micro_batch} of every data rank alone: loss = nan" not in report


def test_weights_that_blew_up_in_rl(material, tmp_path):
    """A learning rate of 1000: the updates after the first are skipped, and weights and moments stand still."""
    path, overrides = write_config(tmp_path, RL, material["tiny"], material["data"], "rl")
    ended = run_job(
        2,
        tmp_path / "job",
        [
            "--config",
            path,
            *overrides,
            f"model.reference_path='{material['tiny_other']}'",  # without rewards the KL alone has a gradient
            "logging.probe_interval=0",
            "logging.eval_interval=0",
            "train.num_steps=2",
            "optimizer.learning_rate=1000.0",
            "parallel.pipeline_model_parallel_size=2",
            "loss.attention_target=old",
            "train.keep_replays=1",
            "train.export=false",
            f"train.output_dir={tmp_path}/run",
        ],
    )
    assert ended.codes == [0, 0], ended.output
    [folder] = replay_of(ended.output[0])  # the second is one too many
    assert folder.endswith("step_00000001_update_002")
    for rank in range(2):
        first, second = (
            load_file(tmp_path / f"run/checkpoints/step_{step:08d}/rank_{rank:05d}.safetensors") for step in (1, 2)
        )
        assert set(first) == set(second)
        assert all(torch.equal(first[key], second[key]) for key in first) and first["adamw_step"] == 1
    again = run_job(2, tmp_path / "again", [folder], module="megatron_ral.replay")
    assert again.codes == [0, 0] and "reproduced: the loss" in again.output[0], again.output
    assert "term policy_gradient alone: " in again.output[0] and "not finite in" in again.output[0]


def test_replay_of_a_finite_batch_says_so(material, tmp_path):
    """With repaired weights in the stored replay, the same batch is finite, and the report says so."""
    path, overrides = write_config(tmp_path, RL, material["tiny"], material["data"], "rl")
    common = ["--config", path, *overrides, "logging.probe_interval=0", "logging.eval_interval=0", "train.num_steps=1"]
    common.append(f"model.reference_path='{material['tiny_other']}'")
    ended = run_job(
        2, tmp_path / "job", common + ["optimizer.learning_rate=1000.0", f"train.output_dir={tmp_path}/run"]
    )
    [folder] = replay_of(ended.output[0])
    for file in (tmp_path / "run/replay").glob("*/hf/*.safetensors"):
        [source] = material["tiny"].glob("*.safetensors")
        hub, mine = load_file(source), load_file(file)
        assert {name.split(".")[-2] for name in mine} <= {name.split(".")[-2] for name in hub}
        shutil.copy(source, file)
    again = run_job(2, tmp_path / "again", [folder], module="megatron_ral.replay")
    assert again.codes == [1, 1] and "not reproduced" in again.output[0], again.output


def test_adapters_that_blew_up(material, tmp_path):
    """A replay holds the base as it was and the adapters by themselves, and runs again from both."""
    path, overrides = write_config(tmp_path, RL, material["tiny"], material["data"], "rl")
    settings = [
        f"model.reference_path='{material['tiny_other']}'",  # without rewards the KL alone has a gradient
        "adapter.rank=2",
        "optimizer.learning_rate=2.0e+37",
        "logging.probe_interval=0",
        "logging.eval_interval=0",
        "train.num_steps=1",
        "train.keep_replays=1",
        "train.export=false",
        f"train.output_dir={tmp_path}/run",
    ]
    ended = run_job(2, tmp_path / "job", ["--config", path, *overrides, *settings])
    assert ended.codes == [0, 0], ended.output
    [folder] = replay_of(ended.output[0])
    assert not differing_weights(material["tiny"], f"{folder}/hf")
    factors = load_file(f"{folder}/adapter/adapter_model.safetensors")
    assert len(factors) == 2 * 7 * 4 and max(float(factor.abs().max()) for factor in factors.values()) > 1e36
    again = run_job(2, tmp_path / "again", [folder], module="megatron_ral.replay")
    assert again.codes == [0, 0] and "reproduced: the loss" in again.output[0], again.output
