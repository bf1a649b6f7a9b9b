"""Sections about observing a run: the log, and the watchdog over its ranks."""

from pydantic.dataclasses import dataclass

from megatron_ral.config.fields import STRICT, NonNegativeFloat, NonNegativeInt, PositiveInt


@dataclass(frozen=True, config=STRICT)
class LoggingConfig:
    """Content of the log, and how often it is written."""

    tensorboard: bool = True
    """TensorBoard event files in <output_dir>/tensorboard, written by rank 0."""
    wandb: str = ""
    """Project of Weights & Biases that gets the same scalars from rank 0; empty for none. Needs the package wandb."""
    gradient_ratio_interval: NonNegativeInt = 1
    """Steps between measurements of |gradient of the attention term| / |gradient of the token terms|; 0 for none. Each
    measurement costs one more forward and backward pass over the samples of one optimizer step, two with a teacher."""
    completions_interval: NonNegativeInt = 5
    """Steps between logged texts of sampled responses and their rewards; 0 for none."""
    num_completions: PositiveInt = 4
    """Number of responses in each such log entry."""
    eval_interval: NonNegativeInt = 0
    """Steps between evaluations on data.eval_shards; 0 for none during training."""
    num_eval_prompts: PositiveInt = 400
    """Maximum number of prompts per evaluation, from the first of data.eval_shards."""
    probe_interval: NonNegativeInt = 5
    """Steps between attention pictures of a few fixed prompts; 0 for none."""
    num_probes: PositiveInt = 4
    """Number of these fixed prompts, from the first of data.eval_shards."""
    peak_tflops: NonNegativeFloat = 0.0
    """Peak of one accelerator in TFLOP/s at model.dtype, for `throughput/mfu`. 0 uses the device's known peak (bfloat16
    on A100, H100 and H200); on other devices no utilisation is logged then."""


@dataclass(frozen=True, config=STRICT)
class WatchdogConfig:
    """Conditions under which a dead or stalled rank ends the whole job."""

    timeout_seconds: NonNegativeInt = 60
    """Seconds after which a rank ends the job when it died, was stopped, or its main thread made no progress (no
    micro-batch, token, sample or phase); 0 for no watchdog. With an accelerator a stall counts only from the moment at
    which no rank makes progress. One call of a reward function may take 70 % of it, in an evaluation as well; without
    a watchdog it may take long_timeout_seconds."""
    long_timeout_seconds: PositiveInt = 1800
    """The same limit for phases that may be silent for long: start-up, loading, checkpoints, export, and the first
    phase of each kind, in which kernels are compiled. A death is still noticed at once on the same machine."""

    @property
    def reward_time_limit(self) -> float:
        """Return the seconds that one call of a reward function may take: it ends before the watchdog ends the job."""
        return 0.7 * self.timeout_seconds or float(self.long_timeout_seconds)
