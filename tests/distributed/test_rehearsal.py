"""A rehearsed launch: its figures add up, its bytes are those that real processes send, what cannot work is refused."""

import gc
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ral.config import ConfigError, load_config
from megatron_ral.models.shape import read_shape
from megatron_ral.parallel.traffic import CountedTraffic
from tests.distributed.cases import GROUP_SIZE, LENGTH, fixed_minibatch, make_config, open_policy
from tests.distributed.runner import run_ranks

PROJECT = Path(__file__).parents[2]
MODELS = PROJECT / "pretrained_configs" / "models"
RUNS = PROJECT / "pretrained_configs" / "runs"


def published(size: str, *overrides: str):
    run = {"qwen2.5-vl-72b": "ral_70b", "qwen2.5-vl-7b": "ral_7b"}[size]
    return load_config(RUNS / f"{run}.yaml", [f"model.path={MODELS / size}", *overrides]), read_shape(str(MODELS / size))


def rehearsed(size: str, world_size: int, overrides: list[str], visual_tokens: int = 64) -> dict:
    """Runs in a process of its own: it plays ranks of jobs that are not there."""
    from megatron_ral.planning.rehearse import rehearse
    from megatron_ral.planning.report import describe

    config, shape = published(size, *overrides)
    result = rehearse(config, shape, world_size, visual_tokens=visual_tokens)
    return {"text": describe(result), "total": result.total_parameters, "fits": result.fits, "peak": result.peak_bytes,
            "stages": [(report.stages, report.rank.numel, report.zero.shard_numel, report.zero.padding,
                        report.zero.data_size, len(report.zero.parameters)) for report in result.ranks],
            "memory": {report.stages[0]: report.memory for report in result.ranks},
            "checkpoint": result.checkpoint_bytes, "trained": [report.zero.trained_numel for report in result.ranks]}


@pytest.mark.parametrize("size, world_size, total", [("qwen2.5-vl-72b", 64, 73_410_777_344),
                                                     ("qwen2.5-vl-7b", 8, 8_292_166_656)])
def test_a_published_size_adds_up(size, world_size, total):
    """At the layout of the launch script; short sequences, because the figures of parameters do not depend on them."""
    [result] = run_ranks(1, rehearsed, size, world_size,
                         ["data.max_prompt_length=256", "rollout.max_response_length=16"], timeout=600)
    config, shape = published(size)
    tensor, pipeline = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    assert result["total"] == total and f"{total:,} parameters" in result["text"]
    assert sorted(stage for stages, *_ in result["stages"] for stage in stages) == list(range(pipeline))
    copies = 0
    for stages, numel, shard, padding, data_size, count in result["stages"]:
        assert data_size == world_size // (tensor * pipeline)
        assert shard * data_size == numel + padding and 0 <= padding < data_size * count
        copies += numel * len(stages) * tensor
    # All tensor ranks of all stages hold the model once, and again what every tensor rank has a copy of.
    vision = sum(parameter.numel() for parameter in _tower(shape).parameters())
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    assert copies == total + (tensor - 1) * (vision + norms)
    assert result["checkpoint"] == 12 * world_size // pipeline * sum(
        trained * len(stages) for (stages, *_), trained in zip(result["stages"], result["trained"]))


def _tower(shape):
    from megatron_ral.models.families import build_tower

    with torch.device("meta"):
        return build_tower(shape.vision)


def test_what_cannot_work_is_refused():
    from megatron_ral.planning.rehearse import check_possible

    config, shape = published("qwen2.5-vl-72b")
    for world_size, key, value, message in (
            (60, "tensor_model_parallel_size", 8, "does not divide the world size 60"),
            (60, "tensor_model_parallel_size", 5, "5 does not divide the 64 attention heads"),
            (81 * 8, "pipeline_model_parallel_size", 81, "81 is more than the 80 layers"),
            (1024, "tensor_model_parallel_size", 8, "rollout.num_prompts = 64 is not divisible by 64 data-parallel ranks")):
        parallel = replace(config.parallel, **{"pipeline_model_parallel_size": 2, key: value})
        parallel = replace(parallel, pipeline_model_parallel_size=1) if value == 5 else parallel
        changed = replace(config, parallel=parallel, rollout=replace(config.rollout, num_prompts=64 if value != 5 else 48))
        with pytest.raises(ConfigError, match=message):
            check_possible(changed, shape, world_size)


def way_out(visual_tokens: int) -> dict:
    from megatron_ral.planning.hardware import Hardware
    from megatron_ral.planning.rehearse import rehearse
    from megatron_ral.planning.search import find_way_out, with_settings

    config, shape = published("qwen2.5-vl-7b", "data.max_prompt_length=2048", "rollout.max_response_length=128",
                              "logging.gradient_ratio_interval=0")
    hardware = Hardware(gpu_memory_gib=35.0)
    result = rehearse(config, shape, 8, hardware, visual_tokens=visual_tokens)
    settings, _ = find_way_out(result, shape, visual_tokens)
    again = rehearse(with_settings(config, settings), shape, 8, hardware, visual_tokens=visual_tokens)
    return {"before": result.fits, "peak": result.peak_bytes, "settings": settings, "after": again.fits,
            "smaller": again.peak_bytes}


def test_what_does_not_fit_names_a_setting_with_which_it_does():
    [result] = run_ranks(1, way_out, 64, timeout=600)
    assert not result["before"] and result["settings"]
    assert result["after"] and result["smaller"] < result["peak"]


def real_step(path: str, other: str, data: str, tensor: int, pipeline: int, settings: dict) -> dict:
    """Bytes by (group, kind) of one optimizer step in real processes, and the shapes that it had."""
    opened = open_policy(path, tensor, pipeline, num_groups=16, **settings)
    _, groups, _, policy, objective = opened
    minibatch = fixed_minibatch(opened, other, data, 2, settings.get("sequence_parallel", False))
    named = {"tensor": groups.tensor, "pipeline": groups.pipeline, "data": groups.data}
    with CountedTraffic({**named, **({"embedding": groups.embedding} if groups.embedding else {})}) as traffic:
        policy.forward_backward(minibatch, objective)
        policy.step()
    prompts = minibatch[0].groups.prompts
    sent = {("pipeline" if kind == "send" else group, kind): size for (group, kind), size in traffic.sent_bytes.items()
            # Point-to-point calls do not always name their group; a group of one rank moves nothing.
            if kind != "receive" and not (group == "data" and groups.layout.data_size == 1)}
    return {"sent": sent, "P": prompts.input_ids.shape[1], "micro_batches": len(minibatch),
            "visual": int(prompts.visual_mask[0].sum()), "held": policy.shard_bytes(),
            "stage": policy.layout.pipeline_rank}


def real_memory(path: str, other: str, data: str, tensor: int, pipeline: int, settings: dict) -> dict:
    """Most bytes that were alive at once, beyond what is held between uses, while the stage runs one optimizer step."""
    from megatron_ral.planning.fakes import Watched

    opened = open_policy(path, tensor, pipeline, num_groups=16, **settings)
    _, _, _, policy, objective = opened
    minibatch = fixed_minibatch(opened, other, data, 2, settings.get("sequence_parallel", False))
    gc.collect()
    watched = Watched()
    watched.call_it("before", *(value for value in gc.get_objects() if isinstance(value, torch.Tensor)))
    with watched, watched.phase() as seen:
        policy.accumulate(minibatch, objective)
    prompts = minibatch[0].groups.prompts
    return {"peak": seen.peak_bytes - seen.peak["before"], "P": prompts.input_ids.shape[1], "visual": int(prompts.visual_mask[0].sum()),
            "stage": policy.layout.pipeline_rank}


def played_memory(path: str, tensor: int, pipeline: int, P: int, visual: int, settings: dict) -> dict:
    """The same, rehearsed: gather, micro-batches, reduction."""
    from megatron_ral.planning.rehearse import rehearse

    config = make_config(path, tensor=tensor, pipeline=pipeline, num_groups=16, **settings)
    config = replace(config, data=replace(config.data, max_prompt_length=P), rollout=replace(config.rollout, num_epochs=1),
                     logging=replace(config.logging, gradient_ratio_interval=0))
    result, peaks = rehearse(config, read_shape(path), 4, visual_tokens=visual, on_gpu=False), {}
    for report in result.ranks:
        held = sum(report.zero.held(config).values())
        waiting = report.memory["update"]["visual features"]
        rows = sum(report.rank.phases[name].held for name in ("old", "reference")) * result.work.passes
        beside = held + waiting + rows
        peak = max(sum(report.memory["gather"].values()) - held,
                   *(sum(report.memory[name].values()) - beside for name in ("update", "reduce")))
        peaks.update({stage: peak for stage in report.stages})
    return peaks


MEMORY_CASES = [(2, 2, {"sequence_parallel": True}), (1, 2, {}), (2, 1, {}), (1, 1, {}),
                (1, 2, {"parallel": {"recompute_activations": True}})]


@pytest.mark.parametrize("tensor, pipeline, settings", MEMORY_CASES)
def test_memory_is_that_of_real_processes(material, tensor, pipeline, settings):
    path = str(material["tiny"])
    real = run_ranks(4, real_memory, path, str(material["tiny_other"]), str(material["data"]), tensor, pipeline, settings)
    [played] = run_ranks(1, played_memory, path, tensor, pipeline, real[0]["P"], real[0]["visual"], settings)
    print([(rank["stage"], rank["peak"], played[rank["stage"]]) for rank in real])  # -s shows the figures
    for rank in real:
        assert abs(played[rank["stage"]] - rank["peak"]) <= 0.15 * rank["peak"], (rank, played)


def played_step(path: str, tensor: int, pipeline: int, P: int, visual: int, settings: dict) -> dict:
    """The same, rehearsed."""
    from megatron_ral.planning.rehearse import rehearse

    config = make_config(path, tensor=tensor, pipeline=pipeline, num_groups=16, **settings)
    config = replace(config, data=replace(config.data, max_prompt_length=P),
                     rollout=replace(config.rollout, num_epochs=1))
    result = rehearse(config, read_shape(path), 4, visual_tokens=visual, on_gpu=False)
    assert (result.work.micro_batch, result.work.group_size, result.work.response_length) == (2, GROUP_SIZE, LENGTH)
    return {stage: {"sent": {key: size for key, size in report.sent["update"].items() if key[1] != "receive"}, "micro_batches": result.work.micro_batches,
                    "shard": report.zero.shard_numel * 4, "trained": report.zero.trained_numel * 4,
                    "whole": report.rank.numel * 4}
            for report in result.ranks for stage in report.stages}


@pytest.mark.parametrize("tensor, pipeline, settings", [
    (2, 2, {"sequence_parallel": True}), (1, 2, {}), (2, 1, {}), (1, 2, {"parallel": {"gather": "layer"}})])
def test_bytes_are_those_of_real_processes(material, tensor, pipeline, settings):
    path = str(material["tiny"])
    real = run_ranks(4, real_step, path, str(material["tiny_other"]), str(material["data"]), tensor, pipeline, settings)
    [played] = run_ranks(1, played_step, path, tensor, pipeline, real[0]["P"], real[0]["visual"], settings)
    for rank in real:
        mine = played[rank["stage"]]
        assert mine["micro_batches"] == rank["micro_batches"]
        for key in rank["sent"].keys() | mine["sent"].keys():
            ours, theirs = mine["sent"].get(key, 0), rank["sent"].get(key, 0)
            if max(ours, theirs) > 4096:  # scalars of the log are not rehearsed
                assert abs(ours - theirs) <= 0.15 * theirs, (rank["stage"], key, ours, theirs)
        held = rank["held"]
        assert mine["shard"] == held["parameters"] and mine["trained"] == held["gradients"] == held["master weights"]
        assert mine["whole"] == held["whole stage"]


def test_the_launch_script_rehearses_what_it_launches(tmp_path):
    """The same configuration, the asked number of ranks, and a refusal in one sentence."""
    command = ["bash", str(PROJECT / "launch_scripts" / "ral_7b.sh"), "--rehearse", "7"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "does not divide the world size 7" in done.stderr and "Traceback" not in done.stderr
