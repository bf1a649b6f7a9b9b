"""Request for responses and what comes back, as the client of a sampler's server has them."""

from dataclasses import dataclass
from typing import Any, Mapping, Sequence

import numpy as np


@dataclass(frozen=True)
class SamplingRequest:
    """Prompts of one request, and the settings of their responses."""

    sizes: Sequence[tuple[int, int, int]]
    """Numbers of tokens, images and patches of each prompt."""
    ids: np.ndarray
    """Token ids of all prompts, one after the other, int32."""
    grids: np.ndarray
    """[images, 3] int64."""
    patches: np.ndarray
    """[patches, numbers of a patch] uint8."""
    seeds: np.ndarray
    """[prompts, responses] uint64."""
    settings: Mapping[str, Any]
    """Values of `server.Sampling`, by name."""

    def only(self, rows: Sequence[int]) -> "SamplingRequest":
        """Return the request for some of the prompts."""
        ends = np.cumsum(np.array(self.sizes, np.int64).reshape(-1, 3), axis=0)
        starts = ends - np.array(self.sizes, np.int64).reshape(-1, 3)

        def parts(array: np.ndarray, column: int) -> np.ndarray:
            pieces = [array[starts[row, column] : ends[row, column]] for row in rows]
            return np.concatenate([array[:0], *pieces])

        return SamplingRequest(
            [self.sizes[row] for row in rows],
            parts(self.ids, 0),
            parts(self.grids, 1),
            parts(self.patches, 2),
            self.seeds[list(rows)],
            self.settings,
        )


@dataclass(frozen=True)
class SampledGroup:
    """Responses to one prompt."""

    tokens: np.ndarray
    """Token ids of all responses, one after the other, int32."""
    logprobs: np.ndarray
    """Their log-probabilities, float32."""
    lengths: Sequence[int]
    ended: Sequence[bool]
    """For each response, whether it ended with the end token."""
    version: int
    """Version of the weights that it was sampled with."""
