"""How fast a step was and what it took: samples and tokens per second, model FLOP/s, utilisation, memory."""

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
"""Dense bfloat16 peak by a part of the device's name, the first that fits. Source: NVIDIA's data sheets, without
sparsity."""


def known_peak_tflops(device_name: str, dtype: str) -> float:
    """Peak of one accelerator in TFLOP/s; 0: not known (only bfloat16 is)."""
    if dtype == "bfloat16":
        for part, peak in _PEAK_TFLOPS.items():
            if part in device_name:
                return peak
    return 0.0


class Throughput:
    """Measures the steps of a run.

    Args:
        config: of the run.
        shape: of the policy.
        teacher: of the teacher, None: there is none.
        groups: all ranks take part in every measurement.
    """

    def __init__(
        self, config: RunConfig, shape: ModelShape, teacher: Optional[ModelShape], process_groups: ProcessGroups
    ):
        self.config, self.shape, self.teacher, self.process_groups = config, shape, teacher, process_groups
        self.per_patch = tower_flops_per_patch(shape)
        self.teacher_per_patch = tower_flops_per_patch(teacher) if teacher is not None else 0.0
        on_gpu = process_groups.device.type == "cuda"
        self.peak_tflops = config.logging.peak_tflops or (
            known_peak_tflops(torch.cuda.get_device_name(process_groups.device), config.model.dtype) if on_gpu else 0.0
        )

    def measure(self, report: StepReport) -> dict[str, float]:
        """Scalars of one step by tag, the same on every rank.

        `throughput/samples_per_second` are responses (supervised: samples) over the whole step; generated and trained
        tokens are response tokens over the seconds of their phase, trained ones once for each pass over the rollout.
        `memory/*` are the largest of all ranks since the last step.
        """
        batches = report.supervised or [scored.groups for scored in report.rollout]
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
        epochs = self.config.rollout.num_epochs if is_rl else 1
        result = {
            "throughput/samples_per_second": total["samples"] / step,
            "throughput/trained_tokens_per_second": epochs * total["tokens"] / seconds["update"],
            "throughput/model_tflops_per_rank": tflops,
        }
        if is_rl:
            result["throughput/generated_tokens_per_second"] = total["tokens"] / seconds["rollout"]
        if self.peak_tflops:
            result["throughput/mfu"] = tflops / self.peak_tflops
        return result | self._memory() | {f"timing/share/{name}": value / step for name, value in seconds.items()}

    def _flops(self, batch: GroupBatch) -> float:
        """Of one micro-batch in the whole step: generation and each pass without gradient count one forward pass, an
        update three. Backward passes that only measure are not counted, nor who of policy and teacher answered."""
        config, prompts = self.config, batch.prompts
        lengths = list(zip(prompts.prompt_lengths.tolist(), batch.response_lengths.tolist()))
        patches = sum(len(prompt.pixel_values) for prompt in prompts.prompts)
        supervised = config.train.algorithm == "sft"
        epochs = 1 if supervised else config.rollout.num_epochs
        old = 1 - num_on_policy_updates(config.rollout.num_epochs) / config.rollout.num_minibatches  # generation counts one
        extra = 0 if supervised else (1 + old + config.needs_reference + (config.loss.attention_target == "ema"))
        passes = extra + 3 * epochs
        towers = passes if config.model.train_vision else 1 + (not supervised and bool(config.model.reference_path))
        flops = passes * sum(group_flops(self.shape, *length) for length in lengths) + towers * patches * self.per_patch
        if self.teacher is not None and not supervised:
            flops += epochs * (
                sum(group_flops(self.teacher, *length) for length in lengths) + patches * self.teacher_per_patch
            )
        return flops

    def _memory(self) -> dict[str, float]:
        on_gpu, own = self.process_groups.device.type == "cuda", [psutil.Process().memory_info().rss / 2**30]
        if on_gpu:
            own.append(torch.cuda.max_memory_allocated(self.process_groups.device) / 2**30)
            torch.cuda.reset_peak_memory_stats(self.process_groups.device)
        return dict(zip(("memory/host_gib", "memory/device_peak_gib"), _largest(gather_from_all(own))))


def _largest(rows: Sequence[Sequence[float]]) -> list[float]:
    return [max(column) for column in zip(*rows)]
