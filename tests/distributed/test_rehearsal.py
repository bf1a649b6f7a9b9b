"""Rehearsal of a launch: its figures add up and are those of real processes, and impossible settings are refused."""

import gc
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ral.config import load_config
from megatron_ral.errors import ConfigError
from megatron_ral.models.shape import read_shape
from megatron_ral.parallel.traffic import CountedTraffic
from megatron_ral.planning.launch_plan import LaunchPlan
from tests.distributed.cases import GROUP_SIZE, LENGTH, fixed_minibatch, make_config, open_policy
from tests.distributed.runner import run_ranks

PROJECT = Path(__file__).parents[2]
MODELS = PROJECT / "pretrained_configs" / "models"
RUNS = PROJECT / "pretrained_configs" / "runs"


def published(size: str, *overrides: str):
    run = {"qwen2.5-vl-72b": "ral_70b", "qwen2.5-vl-7b": "ral_7b"}[size]
    return load_config(RUNS / f"{run}.yaml", [f"model.path={MODELS / size}", *overrides]), read_shape(
        str(MODELS / size)
    )


def held_stages(size: str, world_size: int) -> list[tuple]:
    """Build every distinct stage of a layout.

    It runs in a process of its own, because it simulates ranks of jobs that do not exist.

    Returns:
        (stages, elements of a tensor rank, shard, padding, number of parameters, trained shard) of each.
    """
    from megatron_ral.parallel.process_groups import simulate_rank
    from megatron_ral.planning.fakes import Watched, fake_tensors
    from megatron_ral.planning.rehearse import check_possible, distinct_stages
    from megatron_ral.planning.simulated_policy import SimulatedPolicy
    from megatron_ral.planning.zero3 import StageBytes

    config, shape = published(size)
    plan, result = LaunchPlan.from_config(config, world_size), []
    check_possible(plan, shape)
    layout = plan.layout
    for stages in distinct_stages(plan, shape):
        rank = layout.rank_of(0, 0, stages[0])
        with (
            simulate_rank(
                rank, world_size, tensor_size=layout.tensor_size, pipeline_size=layout.pipeline_size
            ) as process_groups,
            fake_tensors(),
        ):
            policy = SimulatedPolicy(shape, process_groups, plan.engine, plan.training, Watched())
            parameters = policy.parameters()
        zero = StageBytes(parameters, layout.data_size, 2, "stage", (), False)
        result.append(
            (
                stages,
                sum(parameter.numel for parameter in parameters),
                zero.shard_numel,
                zero.padding,
                len(parameters),
                zero.trained_numel,
            )
        )
    return result


@pytest.mark.parametrize(
    "size, world_size, total", [("qwen2.5-vl-72b", 64, 73_410_777_344), ("qwen2.5-vl-72b", 256, 73_410_777_344)]
)
def test_a_published_size_adds_up(size, world_size, total):
    """At the layout of the launch script, all shards of all ranks are the published model, apart from copies."""
    [result] = run_ranks(1, held_stages, size, world_size)
    config, shape = published(size)
    tensor, pipeline = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    assert sorted(stage for stages, *_ in result for stage in stages) == list(range(pipeline))
    copies, data_size = 0, world_size // (tensor * pipeline)
    for stages, numel, shard, padding, count, _ in result:
        assert shard * data_size == numel + padding and 0 <= padding < data_size * count
        copies += numel * len(stages) * tensor
    # All tensor ranks of all stages hold the model once, and copies of the parameters that every tensor rank needs.
    vision = sum(parameter.numel() for parameter in _tower(shape).parameters())
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    assert copies == total + (tensor - 1) * (vision + norms)
    frozen = vision * tensor  # the tower, with a copy on every tensor rank of the first stage
    trained = sum(trained * len(stages) for stages, *_, trained in result) * tensor * data_size
    assert 0 <= trained - (copies - frozen) < 1e-6 * total


def _tower(shape):
    from megatron_ral.models.families import build_tower

    with torch.device("meta"):
        return build_tower(shape.vision)


def test_impossible_layouts_are_refused():
    from megatron_ral.planning.rehearse import check_possible

    config, shape = published("qwen2.5-vl-72b")
    for world_size, key, value, message in (
        (60, "tensor_model_parallel_size", 8, "does not divide the world size 60"),
        (60, "tensor_model_parallel_size", 5, "5 does not divide the 64 attention heads"),
        (81 * 8, "pipeline_model_parallel_size", 81, "81 is more than the 80 layers"),
        (
            1024,
            "tensor_model_parallel_size",
            8,
            "rollout.num_prompts = 64 is not divisible by the 64 data-parallel ranks",
        ),
    ):
        parallel = replace(config.parallel, **{"pipeline_model_parallel_size": 2, key: value})
        parallel = replace(parallel, pipeline_model_parallel_size=1) if value == 5 else parallel
        changed = replace(
            config, parallel=parallel, rollout=replace(config.rollout, num_prompts=64 if value != 5 else 48)
        )
        with pytest.raises(ConfigError, match=message):
            check_possible(LaunchPlan.from_config(changed, world_size), shape)


def way_out(path: str) -> dict:
    """Find settings for a GPU that has a little less memory than the launch takes."""
    from megatron_ral.planning.hardware import Hardware
    from megatron_ral.planning.rehearse import rehearse
    from megatron_ral.planning.report import describe
    from megatron_ral.planning.search import find_way_out

    config, shape = make_config(path, tensor=2, pipeline=2, num_groups=16), read_shape(path)
    result = rehearse(LaunchPlan.from_config(config, 4), shape)
    hardware = Hardware(gpu_memory_gib=0.9 * result.peak_bytes / 2**30, reserved_gib=0.0)
    result = replace(result, hardware=hardware)
    settings, again = find_way_out(result, shape)
    supervised = replace(
        config, train=replace(config.train, algorithm="sft", batch_size=8), loss=replace(config.loss, kl_coef=0.0)
    )
    return {
        "before": result.fits,
        "peak": result.peak_bytes,
        "settings": settings,
        "after": again.fits,
        "smaller": again.peak_bytes,
        "text": describe(result),
        "phases": list(result.seconds),
        "cache": [(report.memory["generation"]["KV cache"], report.rank.cache_bytes) for report in result.ranks],
        "sft": list(rehearse(LaunchPlan.from_config(supervised, 4), shape).seconds),
    }


def test_a_launch_that_does_not_fit_names_settings_with_which_it_does(material):
    [result] = run_ranks(1, way_out, str(material["tiny"]))
    assert not result["before"] and result["settings"] and "DOES NOT FIT" in result["text"]
    assert result["after"] and result["smaller"] < result["peak"]
    assert result["phases"] == ["vision", "generation", "old", "reference", "update", "optimizer", "checkpoint"]
    assert result["sft"] == ["update", "optimizer", "checkpoint"]
    assert all(0 < one < held <= 2 * one for held, one in result["cache"])  # two stages, two batches in flight


def longest(batch):
    """Return a micro-batch whose responses are as long as they may be, which is what a rehearsal takes them to be."""
    groups = batch.groups
    assert groups.response_ids.shape[2] == LENGTH
    return replace(batch, groups=replace(groups, response_lengths=torch.full_like(groups.response_lengths, LENGTH)))


def real_step(path: str, other: str, data: str, tensor: int, pipeline: int, settings: dict) -> dict:
    """Run one optimizer step in real processes.

    Returns:
        Bytes sent by (process group, collective), largest number of live bytes beyond those held between uses, and the
        shapes of the step.
    """
    from megatron_ral.planning.fakes import Watched

    opened = open_policy(path, tensor, pipeline, num_groups=16, **settings)
    _, process_groups, _, policy, objective = opened
    minibatch = fixed_minibatch(opened, other, data, 2, settings.get("sequence_parallel", False), alike=True)
    minibatch = [longest(batch) for batch in minibatch]
    named = {"tensor": process_groups.tensor, "pipeline": process_groups.pipeline, "data": process_groups.data}
    gc.collect()
    watched = Watched()
    watched.call_it("before", *(value for value in gc.get_objects() if isinstance(value, torch.Tensor)))
    with CountedTraffic(
        {**named, **({"embedding": process_groups.embedding} if process_groups.embedding else {})}
    ) as traffic:
        with watched, watched.phase() as seen:
            policy.forward_backward(minibatch, objective)
        policy.step()
    prompts = minibatch[0].groups.prompts
    sent = {
        ("pipeline" if kind == "send" else group, kind): size
        for (group, kind), size in traffic.sent_bytes.items()
        # Point-to-point calls do not always name their group. A group of one rank sends nothing.
        if kind != "receive" and not (group == "data" and process_groups.layout.data_size == 1)
    }
    return {
        "sent": sent,
        "P": prompts.input_ids.shape[1],
        "micro_batches": len(minibatch),
        "visual": int(prompts.visual_mask[0].sum()),
        "held": policy.shard_bytes(),
        "peak": seen.peak_bytes - seen.peak["before"],
        "stage": policy.layout.pipeline_rank,
    }


def rehearsed_step(path: str, tensor: int, pipeline: int, P: int, visual: int, settings: dict) -> dict:
    """Rehearse the step of `real_step`; returns the same numbers by stage."""
    from megatron_ral.planning.rehearse import rehearse

    config = make_config(path, tensor=tensor, pipeline=pipeline, num_groups=16, **settings)
    config = replace(
        config,
        data=replace(config.data, max_prompt_length=P),
        rollout=replace(config.rollout, num_epochs=1),
        logging=replace(config.logging, gradient_ratio_interval=0),
    )
    plan, stages = LaunchPlan.from_config(config, 4, visual), {}
    result, work = rehearse(plan, read_shape(path), on_gpu=False), plan.work
    assert (work.micro_batch, work.group_size, work.response_length) == (2, GROUP_SIZE, LENGTH)
    for report in result.ranks:
        held = sum(report.zero.held(plan.parallel.offload_optimizer, plan.holds_reference).values())
        rows = sum(phase.held for name, phase in report.rank.phases.items() if name in ("old", "reference"))
        rows *= work.passes
        beside = held + report.memory["update"]["visual features"] + rows
        peak = max(
            sum(report.memory["gather"].values()) - held,
            *(sum(report.memory[name].values()) - beside for name in ("update", "reduce")),
        )
        for stage in report.stages:
            stages[stage] = {
                "sent": {key: size for key, size in report.sent["update"].items() if key[1] != "receive"},
                "micro_batches": work.micro_batches,
                "peak": peak,
                "share": report.update_share,
                "shard": report.zero.shard_numel * 4,
                "trained": report.zero.trained_numel * 4,
                "whole": report.rank.numel * 4,
            }
    return stages


CASES = [
    (2, 2, {"sequence_parallel": True}),
    (1, 2, {}),
    (2, 1, {}),
    (1, 1, {}),
    (1, 2, {"parallel": {"recompute_activations": True}}),
    (1, 2, {"parallel": {"gather": "layer"}}),
    (1, 2, {"parallel": {"overlap_communication": False}}),
]
"""Tensor and pipeline ranks of 4, and further settings. The test takes three, tools/benchmarks/rehearsal.py all."""


@pytest.mark.parametrize("tensor, pipeline, settings", [CASES[0], CASES[1], CASES[5]])
def test_memory_and_bytes_are_those_of_real_processes(material, tensor, pipeline, settings):
    path = str(material["tiny"])
    real = run_ranks(4, real_step, path, str(material["tiny_other"]), str(material["data"]), tensor, pipeline, settings)
    [rehearsed] = run_ranks(1, rehearsed_step, path, tensor, pipeline, real[0]["P"], real[0]["visual"], settings)
    for rank in real:
        mine = rehearsed[rank["stage"]]
        assert mine["micro_batches"] == rank["micro_batches"]
        assert abs(mine["peak"] - rank["peak"]) <= 0.15 * rank["peak"], (rank["stage"], mine["peak"], rank["peak"])
        for key in rank["sent"].keys() | mine["sent"].keys():
            ours, theirs = mine["sent"].get(key, 0), rank["sent"].get(key, 0)
            if max(ours, theirs) > 8192:  # scalars of the log are not rehearsed
                assert abs(ours - theirs) <= 0.15 * theirs, (rank["stage"], key, ours, theirs)
        held = rank["held"]
        assert mine["shard"] == held["parameters"] and mine["trained"] == held["gradients"] == held["master weights"]
        assert mine["whole"] == held["whole stage"]
        assert (mine["share"] <= 1.1) == (settings.get("parallel", {}).get("gather") != "layer")


def test_the_launch_script_rehearses_what_it_launches(tmp_path):
    """The same configuration, the asked number of ranks, and a refusal in one sentence."""
    command = ["bash", str(PROJECT / "launch_scripts" / "ral_7b.sh"), "--rehearse", "7"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "does not divide the world size 7" in done.stderr and "Traceback" not in done.stderr
