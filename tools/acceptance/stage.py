"""A stage with the widths of Qwen2.5-VL-7B and random weights: seconds and memory of an update against the rehearsal.

First with 4 layers, then with as many as fit by the rehearsal. An update is the passes that record attention, and one
optimizer step on groups of the largest size of `ral_7b` (8,192 + 8 x 1,024 tokens).
"""

import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Optional

import torch

from megatron_ral.training.logging.throughput import known_peak_tflops
from tools.acceptance.model import config_of, random_groups, random_weights, settings_of
from tools.acceptance.part import PROJECT, Figure, Setting, at_least, at_most, expect, note, start

LEAST_MFU = 0.3
MEMORY_OVER_REHEARSED = 1.1
"""Limits. Megatron-LM reports 0.41 to 0.48 for whole models. The rehearsal knows no fragments and no workspace."""
MEMORY_SHARE = 0.92
"""Share of the free memory that the larger stage may take by the rehearsal."""
PHASES = ("old", "update", "reduce", "optimizer")
"""Phases of the rehearsal that run here. There is no rollout."""
WAIT = 100.0
"""Seconds that the rehearsal may take longer than the measurement of the first stage."""


@dataclass(frozen=True)
class Measured:
    """One stage."""

    old_seconds: float
    update_seconds: float
    flops: float
    """Model FLOPs of an update: forward and backward, without recomputation."""
    peak_bytes: int
    grad_norm: float


def begin_rehearsal(setting: Setting, layers: tuple[int, int]) -> tuple[subprocess.Popen, Path]:
    """Start the rehearsal of two depths, beside what the GPU does."""
    output = setting.folder / "rehearsal.json"
    output.unlink(missing_ok=True)
    models = []
    for number in layers:
        path, changes = settings_of(setting, number)
        models.append(changes[0].removeprefix("model.path="))
    command = [sys.executable, "-m", "tools.acceptance.rehearsal", "--config", str(path), "--output", str(output)]
    with open(setting.folder / "rehearsal.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, "--models", *models, "--", *changes[1:]],
            cwd=PROJECT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
    return process, output


def read_rehearsal(process: subprocess.Popen, output: Path) -> Optional[list[dict]]:
    """Return the rehearsals of both depths, None where there are none."""
    try:
        process.wait(WAIT)
    except subprocess.TimeoutExpired:
        process.kill()
    return json.loads(output.read_text(encoding="utf-8")) if output.exists() else None


def measure(setting: Setting, process_groups, num_layers: int, repeats: int) -> Measured:
    """Build a stage, run its passes without gradient and `repeats` updates, and drop it."""
    from megatron_ral.models.flops import group_flops
    from megatron_ral.models.shape import read_shape
    from megatron_ral.planning.launch_plan import LaunchPlan
    from megatron_ral.training.build import build_objective, build_policy

    config = config_of(setting, num_layers)
    shape, work = read_shape(config.model.path), LaunchPlan.from_config(config, 1).work
    held = torch.cuda.memory_allocated() if setting.on_gpu else 0
    with random_weights():
        policy = build_policy(config, shape, process_groups)
    objective = build_objective(config, shape, process_groups)
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    groups = [random_groups(policy, work, work.micro_batch, seed) for seed in range(work.micro_batches)]
    term = objective.term("attention")
    old_seconds, update_seconds, result = [], [], None
    for _ in range(1 + repeats):  # the first sets up libraries and compiles kernels
        with timed(setting, old_seconds):
            old = policy.forward(groups, sorted(term.layers), position=term.stored_position, store=term.store)
        batches = minibatch(groups, old)
        with timed(setting, update_seconds):
            policy.forward_backward(batches, objective)
            result = policy.step()
    assert result is not None and result.applied, "the update was skipped, because its loss or gradient is not finite"
    flops = (
        3
        * len(groups)
        * work.micro_batch
        * group_flops(shape, work.prompt_length, [work.response_length] * work.group_size)
    )
    peak = torch.cuda.max_memory_allocated() - held if setting.on_gpu else 0
    del policy, objective, groups, old, batches, term
    gc.collect()
    if setting.on_gpu:
        torch.cuda.empty_cache()
    return Measured(min(old_seconds[1:]), min(update_seconds[1:]), flops, peak, result.grad_norm)


class timed:
    """Context that appends the seconds inside it to a list, device included."""

    def __init__(self, setting: Setting, seconds: list[float]):
        self.setting, self.seconds = setting, seconds

    def now(self) -> float:
        """Return the clock after the device is done."""
        if self.setting.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def __enter__(self) -> None:
        self.begin = self.now()

    def __exit__(self, *error: object) -> None:
        self.seconds.append(self.now() - self.begin)


def minibatch(groups: list, old: list) -> list:
    """Return the micro-batches of an update off the policy, with advantages from -1 to 1."""
    from megatron_ral.types import RlBatch, StepTotals

    B, G, R = groups[0].response_ids.shape
    device = old[0].tokens.logprobs.device
    count = len(groups) * B * G
    advantages = torch.linspace(-1, 1, G, device=device).expand(B, G)
    return [
        RlBatch(
            groups=batch,
            totals=StepTotals(num_tokens=count * R, num_sequences=count, max_response_length=R),
            group_mask=torch.ones(B, dtype=torch.bool, device=device),
            advantages=advantages,
            attention_advantages=advantages,
            rollout_logprobs=output.tokens.logprobs,
            from_teacher=torch.zeros(B, dtype=torch.bool, device=device),
            is_on_policy=False,
            compares_sampler=False,
            old_logprobs=output.tokens.logprobs,
            target_attention=dict(output.attention),
        )
        for batch, output in zip(groups, old)
    ]


def run(setting: Setting) -> Iterator[Figure]:
    """Yield the figures of 4 layers, and of as many as fit."""
    few, more = (4, 8) if setting.on_gpu else (1, 2)
    process, output = begin_rehearsal(setting, (few, more))
    process_groups = start()
    measured = measure(setting, process_groups, few, 3 if setting.on_gpu else 1)
    yield from figures(setting, few, measured)
    rehearsals = read_rehearsal(process, output)
    if rehearsals is None:
        yield expect("rehearsal", "none", False, "bytes of a stage; rehearsal.log says why there are none")
        return
    low, high = (max(item["bytes"][phase] for phase in PHASES) for item in rehearsals)
    yield from beside(setting, few, measured, low, rehearsals[0]["seconds"])
    per_layer = (high - low) / (more - few)
    largest = more
    if setting.on_gpu:
        free = torch.cuda.mem_get_info()[0] * MEMORY_SHARE
        largest = min(28, few + int((free - low) / per_layer))
    yield note("layers that fit by the rehearsal", largest, "", "28 has the 7B")
    if largest <= few:
        return
    measured = measure(setting, process_groups, largest, 2 if setting.on_gpu else 1)
    yield from figures(setting, largest, measured)
    at = {
        name: low_seconds + (rehearsals[1]["seconds"][name] - low_seconds) / (more - few) * (largest - few)
        for name, low_seconds in rehearsals[0]["seconds"].items()
    }
    yield from beside(setting, largest, measured, low + per_layer * (largest - few), at)


def figures(setting: Setting, num_layers: int, measured: Measured) -> Iterator[Figure]:
    """Yield what was measured of one stage."""
    name = f"{num_layers} layers"
    yield note(f"{name}: old pass", round(measured.old_seconds, 3), "s")
    yield note(f"{name}: update", round(measured.update_seconds, 3), "s")
    finite = measured.grad_norm == measured.grad_norm and measured.grad_norm < float("inf")
    yield expect(
        f"{name}: gradient norm", round(measured.grad_norm, 4), finite and measured.grad_norm > 0, "finite, > 0"
    )
    rate = measured.flops / measured.update_seconds / 1e12
    yield note(f"{name}: model TFLOP/s of an update", float(f"{rate:.4g}"), "TFLOP/s")
    peak = known_peak_tflops(torch.cuda.get_device_name(), "bfloat16") if setting.on_gpu else 0.0
    if peak:
        yield at_least(f"{name}: MFU of an update", round(rate / peak, 3), LEAST_MFU)


def beside(
    setting: Setting, num_layers: int, measured: Measured, rehearsed_bytes: float, seconds: dict[str, float]
) -> Iterator[Figure]:
    """Yield measured memory and seconds beside the rehearsal's. A step has two updates, and four passes."""
    name, gib = f"{num_layers} layers", rehearsed_bytes / 2**30
    update = (seconds["update"] + seconds["optimizer"]) / 2
    yield note(f"{name}: rehearsed update", float(f"{update:.3g}"), "s", "an H100 at 0.4 of its peak")
    if setting.on_gpu:
        yield note(f"{name}: peak memory", round(measured.peak_bytes / 2**30, 2), "GiB", f"rehearsed {gib:.2f}")
        share = measured.peak_bytes / rehearsed_bytes
        yield at_most(f"{name}: peak memory / rehearsed", round(share, 3), MEMORY_OVER_REHEARSED)
    else:
        yield expect(f"{name}: rehearsed peak", float(f"{gib:.3g}"), gib > 0, "> 0 GiB")
