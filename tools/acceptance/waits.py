"""Waits of the host for the device over one RL step of a tiny model, by file and line.

torch warns of each under `torch.cuda.set_sync_debug_mode("warn")`. A step before it compiles kernels and records
graphs. Waits of a pass that has not run on this machine before, such as recording, are part of both.
"""

import warnings
from collections import Counter
from contextlib import contextmanager
from typing import Iterator

import torch

from tools.acceptance.part import PROJECT, Figure, Setting, at_most, expect, note, start, tiny_material

MOST_PER_PASS = 2.5
"""Limit of the waits per decoding pass: one for its tokens, and those of rows that are dropped."""


@contextmanager
def watched(setting: Setting) -> Iterator[Counter]:
    """Count the waits inside by (phase, file and line). On the CPU nothing waits."""
    from megatron_ral.planning.gpu_work import place
    from megatron_ral.runtime.progress import progress

    seen: Counter = Counter()

    def show(message, *rest: object, **more: object) -> None:
        if "synchroniz" in str(message):
            seen[progress.phase, place()] += 1

    if not setting.on_gpu:
        yield seen
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        plain, warnings.showwarning = warnings.showwarning, show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = plain


def open_trainer(setting: Setting):
    """Return the trainer of `ral_tiny` with the tiny model."""
    from megatron_ral.config import load_config
    from megatron_ral.models.shape import read_shape
    from megatron_ral.training.trainer import Inputs, Trainer

    model, _, data = tiny_material(setting)
    config = load_config(
        PROJECT / "pretrained_configs/runs/ral_tiny.yaml",
        [
            f"model.path={model}",
            f"model.dtype={'bfloat16' if setting.on_gpu else 'float32'}",
            f"data.train=[{{shards: '{data}/rl-*.tar'}}]",
            "data.eval_shards=''",
            f"train.output_dir={setting.folder}/waits",
            "rollout.num_prompts=8",
            "rollout.num_minibatches=2",
            "train.micro_batch_size=2",
            "logging.tensorboard=false",
            "logging.gradient_ratio_interval=0",
        ],
    )
    process_groups = start()
    return Trainer(config, read_shape(config.model.path), process_groups, Inputs.open(config, False))


def run(setting: Setting) -> Iterator[Figure]:
    """Yield the waits of a step by phase, and their places."""
    trainer = open_trainer(setting)
    trainer._one_step(0)
    with watched(setting) as seen:
        if setting.on_gpu:
            torch.zeros(1, device="cuda").item()  # a wait that must be seen
        own = seen.total()
        report = trainer._one_step(1)
    if setting.on_gpu:
        yield expect("a planted wait is seen", own, own == 1, "1")
    else:
        yield note("waits", "not applicable", "", "a CPU does not wait")
    passes = trainer.config.rollout.max_response_length
    phases: Counter = Counter()
    for (phase, _), count in seen.items():
        phases[phase] += count
    for phase, seconds in report.seconds.items():
        yield note(f"{phase}", round(seconds, 3), "s", f"{phases[phase]} waits")
    yield expect("updates that were skipped", len(report.skipped), not report.skipped, "0")
    yield at_most("waits per decoding pass", round(phases["rollout"] / passes, 2), MOST_PER_PASS)
    yield note("waits of the step", seen.total() - own)
    for (phase, where), count in seen.most_common(12):
        yield note(f"{phase}: {where}", count, "waits")
