"""Sections of what watches a run: the log, and the watchdog over its ranks."""

from pydantic.dataclasses import dataclass

from megatron_ral.config.fields import NonNegativeFloat, NonNegativeInt, PositiveInt, STRICT


@dataclass(frozen=True, config=STRICT)
class LoggingConfig:
    """What TensorBoard gets, and how often."""

    tensorboard: bool = True
    """Write <output_dir>/tensorboard (rank 0)."""
    gradient_ratio_interval: NonNegativeInt = 1
    """Steps between measurements of |grad attention| / |grad tokens|; each costs one more forward
    and backward pass over the samples of one optimizer step (with a teacher too: two). 0: off."""
    completions_interval: NonNegativeInt = 5
    """Steps between texts of sampled responses with their rewards; 0: off."""
    num_completions: PositiveInt = 4
    """Responses shown each time."""
    eval_interval: NonNegativeInt = 0
    """Steps between evaluations on data.eval_shards; 0: never during training."""
    num_eval_prompts: PositiveInt = 400
    """Prompts of data.eval_shards that an evaluation takes at most, the first ones."""
    probe_interval: NonNegativeInt = 5
    """Steps between attention pictures of the fixed probe prompts (the first of data.eval_shards); 0: off."""
    num_probes: PositiveInt = 4
    """Probe prompts."""
    peak_tflops: NonNegativeFloat = 0.0
    """Peak of one accelerator in TFLOP/s at model.dtype, for `throughput/mfu`; 0: of the device where it is known (bfloat16 on
    A100, H100, H200), else no utilisation is logged."""


@dataclass(frozen=True, config=STRICT)
class WatchdogConfig:
    """When a rank that died or stalled ends the whole job."""

    timeout_seconds: NonNegativeInt = 60
    """A rank that died, was stopped, or whose main thread has done nothing (no micro-batch, no token, no sample, no phase)
    has ended the job after so long; 0: off. One call of a reward function must take less. With an accelerator a stall counts from when no rank gets on."""
    long_timeout_seconds: PositiveInt = 1800
    """The same in phases that may be long without a sign of life: start-up, loading, checkpoints, export, and the first
    phase of each kind (kernels are compiled). A death is still seen at once on the same machine."""
