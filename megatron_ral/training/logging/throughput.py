"""Throughput of a step: samples and tokens per second, model FLOP/s, utilisation, memory."""

from dataclasses import dataclass
from typing import Optional, Sequence

import psutil
import torch

from megatron_ral.config import RunConfig
from megatron_ral.models.flops import group_flops, tower_flops_per_patch
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.collectives import gather_from_all, sum_metrics
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.rollout.assemble import num_on_policy_updates
from megatron_ral.training.step import StepReport
from megatron_ral.types import GroupBatch

_PEAK_TFLOPS = {"A100": 312.0, "H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0}
"""Dense bfloat16 peak in TFLOP/s by a part of the device's name; the first part that occurs counts. Source: NVIDIA's
data sheets, figures without sparsity."""


def known_peak_tflops(device_name: str, dtype: str) -> float:
    """Return the peak of one accelerator in TFLOP/s, 0 where it is unknown (only bfloat16 peaks are known)."""
    if dtype == "bfloat16":
        for part, peak in _PEAK_TFLOPS.items():
            if part in device_name:
                return peak
    return 0.0


@dataclass(frozen=True)
class ThroughputSettings:
    """Passes of a step, counted for model FLOPs, and the peak that they are compared with."""

    num_epochs: int
    """Number of passes over a rollout that update the policy; 1 in supervised training."""
    policy_passes: float
    """Forward passes of the language model over each sample in a step. Generation and each pass without gradient count
    one, an update three, because its backward pass takes twice the work of its forward pass."""
    tower_passes: float
    """Forward passes of the vision tower over each patch in a step, counted alike."""
    teacher_passes: int
    """Forward passes of the teacher, if there is one, over each sample in a step."""
    peak_tflops: float
    """Peak of one accelerator in TFLOP/s; 0: the known peak of the device."""
    dtype: str
    """Precision of the policy."""

    @classmethod
    def from_config(cls, config: RunConfig) -> "ThroughputSettings":
        """Return the settings of a run's configuration."""
        if config.train.algorithm == "sft":
            num_epochs, no_gradient, has_other_tower = 1, 0.0, False
        else:
            num_epochs, has_other_tower = config.rollout.num_epochs, bool(config.model.reference_path)
            old = 1 - num_on_policy_updates(num_epochs) / config.rollout.num_minibatches
            no_gradient = 1 + old + config.needs_reference  # generation counts one
        # With adapters a backward pass forms no gradients of the base weights, half of its work.
        passes = no_gradient + (2 if config.adapter.rank else 3) * num_epochs
        return cls(
            num_epochs=num_epochs,
            policy_passes=passes,
            tower_passes=passes if config.model.train_vision else 1 + has_other_tower,
            teacher_passes=0 if config.train.algorithm == "sft" else num_epochs,
            peak_tflops=config.logging.peak_tflops,
            dtype=config.model.dtype,
        )


class Throughput:
    """Meter of a run's steps. Every rank has one and makes the same calls.

    Args:
        settings: Passes of a step and peak of the accelerator.
        shape: Shape of the policy.
        teacher: Shape of the teacher, None without a teacher.
        process_groups: Process groups of the policy.
    """

    def __init__(
        self,
        settings: ThroughputSettings,
        shape: ModelShape,
        teacher: Optional[ModelShape],
        process_groups: ProcessGroups,
    ):
        self.settings, self.shape, self.teacher, self.process_groups = settings, shape, teacher, process_groups
        self.per_patch = tower_flops_per_patch(shape)
        self.teacher_per_patch = tower_flops_per_patch(teacher) if teacher is not None else 0.0
        on_gpu = process_groups.device.type == "cuda"
        self.peak_tflops = settings.peak_tflops or (
            known_peak_tflops(torch.cuda.get_device_name(process_groups.device), settings.dtype) if on_gpu else 0.0
        )

    def measure(self, report: StepReport) -> dict[str, float]:
        """Return the scalars of one step by tag, the same on every rank.

        `throughput/samples_per_second` counts responses (in supervised training, samples) over the whole step.
        Trained tokens are response tokens over the seconds of their phase and count once for each pass over the
        rollout. Generated ones are over the seconds that their rollout took, beside updates or not. `memory/*` are the
        largest values of all ranks since the last step, in GiB.
        """
        batches = report.supervised or [batch.groups for batch in report.rollout]
        counts = {}
        if self.process_groups.layout.is_last_stage:
            counts = {
                "samples": float(sum(batch.response_lengths.numel() for batch in batches)),
                "tokens": float(sum(int(batch.response_lengths.sum()) for batch in batches)),
                "flops": sum(self._flops(batch) for batch in batches),
            }
        total, seconds = sum_metrics(counts, self.process_groups), report.seconds
        step, is_rl = sum(seconds.values()), bool(report.rollout)
        tflops = total["flops"] / step / self.process_groups.layout.world_size / 1e12
        result = {
            "throughput/samples_per_second": total["samples"] / step,
            "throughput/trained_tokens_per_second": self.settings.num_epochs * total["tokens"] / seconds["update"],
            "throughput/model_tflops_per_rank": tflops,
        }
        if is_rl:
            result["throughput/generated_tokens_per_second"] = total["tokens"] / report.sampling_seconds
        if self.peak_tflops:
            result["throughput/mfu"] = tflops / self.peak_tflops
        return result | self._memory() | {f"timing/share/{name}": value / step for name, value in seconds.items()}

    def _flops(self, batch: GroupBatch) -> float:
        """Return the FLOPs of one micro-batch in the whole step.

        Backward passes that only measure a gradient are not counted. The count does not depend on whether the policy or
        the teacher generated a response.
        """
        settings, prompts = self.settings, batch.prompts
        lengths = list(zip(prompts.prompt_lengths.tolist(), batch.response_lengths.tolist()))
        patches = sum(prompt.num_patches for prompt in prompts.prompts)
        flops = settings.policy_passes * sum(group_flops(self.shape, *length) for length in lengths)
        flops += settings.tower_passes * patches * self.per_patch
        if self.teacher is not None:
            flops += settings.teacher_passes * (
                sum(group_flops(self.teacher, *length) for length in lengths) + patches * self.teacher_per_patch
            )
        return flops

    def _memory(self) -> dict[str, float]:
        """Return the largest memory of all ranks in GiB, and start a new peak on a GPU."""
        on_gpu, own = self.process_groups.device.type == "cuda", [psutil.Process().memory_info().rss / 2**30]
        if on_gpu:
            own.append(torch.cuda.max_memory_allocated(self.process_groups.device) / 2**30)
            torch.cuda.reset_peak_memory_stats(self.process_groups.device)
        return dict(zip(("memory/host_gib", "memory/device_peak_gib"), _largest(gather_from_all(own))))


def _largest(rows: Sequence[Sequence[float]]) -> list[float]:
    """Return the largest value of each column."""
    return [max(column) for column in zip(*rows)]
