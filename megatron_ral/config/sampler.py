"""Section about a sampler that is not the trained engine itself."""

from typing import Annotated

from annotated_types import Gt, Lt
from pydantic.dataclasses import dataclass

from megatron_ral.config.fields import STRICT, PositiveFloat, PositiveInt


@dataclass(frozen=True, config=STRICT)
class VllmConfig:
    """vLLM as the sampler: one server per copy of the model, beside the copy's first rank (docs/sampler.md)."""

    python: str = ""
    """Interpreter of the environment that holds vLLM, which launch_scripts/setup_vllm.sh makes."""
    probe_bound: PositiveFloat = 0.05
    """Mean absolute difference, over the tokens of the probe after each push of weights, between the sampler's
    log-probabilities and the policy's, above which the run stops. In float32 both agree to about 1e-5."""
    request_seconds: PositiveInt = 600
    """Seconds after which a request (generation_batch_size prompts) is given up and asked once more."""
    start_seconds: PositiveInt = 400
    """Seconds after which a server that is not ready counts as failed."""
    bucket_mib: PositiveInt = 256
    """Memory through which weights are pushed, in MiB. A larger tensor gets as much as it needs."""
    memory_share: Annotated[float, Gt(0), Lt(1)] = 0.3
    """Share of a GPU's memory, or of the machine's memory where there is none, that a server may take for its weights
    and its KV cache."""
