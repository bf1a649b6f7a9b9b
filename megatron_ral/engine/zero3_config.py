"""Configuration of DeepSpeed ZeRO-3, derived from the engine's settings. A user sets nothing in it directly."""

from typing import Any

import torch

from megatron_ral.models.multimodal import MultimodalStage


def zero3_config(
    stage: MultimodalStage,
    *,
    clip_grad_norm: float = 0.0,
    offload_parameters: bool = False,
    offload_optimizer: bool = False,
    overlap: bool = False,
) -> dict[str, Any]:
    """Return DeepSpeed's configuration of one stage.

    `gradient_accumulation_steps` is 1 because losses are sums over a global denominator already. The persistence
    threshold is 0 because `StageEngine.resident` decides which parameters stay.
    """
    numel = sum(parameter.numel() for parameter in stage.parameters())
    largest = max(parameter.numel() for parameter in stage.parameters())
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_grad_norm,
        "bf16": {"enabled": stage.dtype == torch.bfloat16},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": overlap,
            "contiguous_gradients": True,
            # several buckets, so that some are reduced while the rest is computed
            "reduce_bucket_size": max(largest, min(numel // 4 if overlap else numel, 200_000_000)),
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
            **({"offload_param": host} if offload_parameters else {}),
            **({"offload_optimizer": host} if offload_optimizer else {}),
        },
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is as exact on the host as elsewhere
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
