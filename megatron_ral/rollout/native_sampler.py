"""Sampler on the policy's own pipeline stages: one copy of the weights, the same code as training."""

from typing import Iterable, Iterator, Optional, Sequence

from torch import Tensor

from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.engine.pipelined_decoder import sample_responses
from megatron_ral.engine.policy import PolicyEngine
from megatron_ral.rollout.sampler import Background, SampledBatch
from megatron_ral.types import Prompt, pad_prompts


class NativeSampler:
    """Sampler that decodes with the engine's stages.

    Args:
        engine: Policy. Its stage is gathered while the sampler works.
    """

    def __init__(self, engine: PolicyEngine):
        self.engine = engine

    def sample(
        self, prompts: Iterable[Prompt], settings: SamplingSettings, batch_size: int, *identity: object
    ) -> Iterator[SampledBatch]:
        with self.engine.resident():
            for responses, visual_embeds in sample_responses(self.engine, prompts, settings, batch_size, *identity):
                yield SampledBatch(responses, visual_embeds, (self.engine.num_steps_taken,) * len(responses.prompts))

    def begin(
        self, prompts: Sequence[Prompt], settings: SamplingSettings, batch_size: int, *identity: object
    ) -> Optional[Background]:
        """Start nothing, because an update would change the weights that decode."""
        return None

    def encode_visual(self, prompts: Sequence[Prompt], pad_token_id: int) -> Optional[tuple[Tensor, ...]]:
        return self.engine.encode_visual(pad_prompts(prompts, pad_token_id))

    def close(self) -> None:
        """Do nothing, because the policy is all that there is."""
