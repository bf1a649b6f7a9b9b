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
    """Outputs of the frozen vision tower for each prompt, on the first stage. None elsewhere, and where the sampler did
    not need them."""
    versions: tuple[int, ...]
    """Optimizer updates that were behind the weights that each prompt's responses were sampled with."""


class Background(Protocol):
    """Sampling that goes on while the policy is trained."""

    @property
    def seconds(self) -> float:
        """Seconds for which it has worked so far, on the rank that asked for it. 0 on the other ranks of the copy."""
        ...


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

    def begin(
        self, prompts: Sequence[Prompt], settings: SamplingSettings, batch_size: int, *identity: object
    ) -> Optional[Background]:
        """Start to sample with the weights of this moment what `sample` is then asked for with the same arguments.

        Until that call the policy may be trained. Further prompts that `sample` gets with the same identity are
        answered with the weights of this moment as well, as long as the sampler has them.

        Args:
            prompts, settings, batch_size, identity: As for `sample`.

        Returns:
            The sampling under way. None: nothing was started, because the sampler works on the policy's own devices and
            weights.
        """
        ...

    def encode_visual(self, prompts: Sequence[Prompt], pad_token_id: int) -> Optional[tuple[Tensor, ...]]:
        """Return the outputs of the frozen vision tower for prompts that another model answers."""
        ...

    def close(self) -> None:
        """Let go of what the sampler holds beside the policy."""
        ...
