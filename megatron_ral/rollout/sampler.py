"""Protocol of a sampler: prompts in, groups of responses out."""

from dataclasses import dataclass
from typing import Iterable, Iterator, Optional, Protocol, Sequence

from torch import Tensor

from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.types import Prompt, ResponseBatch


@dataclass(frozen=True)
class SampledBatch:
    """Responses to some prompts, in the order of the prompts."""

    responses: ResponseBatch
    visual_embeds: Optional[tuple[Tensor, ...]]
    """Outputs of the frozen vision tower for each prompt, on the first stage. None elsewhere."""


class Sampler(Protocol):
    """Source of responses. Every rank of a model copy makes the same calls and gets the same responses."""

    def sample(
        self, prompts: Iterable[Prompt], settings: SamplingSettings, batch_size: int, *identity: object
    ) -> Iterator[SampledBatch]:
        """Sample `settings.group_size` responses to each prompt.

        Args:
            prompts: Prompts of this rank, read as they are needed.
            settings: Settings of the draws.
            batch_size: Largest number of prompts in one batch. It bounds memory and never changes the result.
            identity: Key of the random streams. Prompt identity and response number are added.

        Yields:
            Batches that together hold all prompts in their order.
        """
        ...

    def encode_visual(self, prompts: Sequence[Prompt], pad_token_id: int) -> Optional[tuple[Tensor, ...]]:
        """Return the outputs of the frozen vision tower for prompts that another model answers."""
        ...

    def close(self) -> None:
        """Let go of what the sampler holds beside the policy."""
        ...
