"""Inputs and outputs of one forward pass that every layer of a stage needs.

`AttentionPass` takes the place of the attention mask, because megatron-core passes the mask to every core attention
without reading it. Each pass has an object of its own, so that several micro-batches can be in a pipeline at once.
"""

from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor

from megatron_ral.attention.group_layout import AttentionRecord, GroupLayout
from megatron_ral.models.kv_cache import GroupKVCache


@dataclass(frozen=True)
class VisualFeatures:
    """Features of the vision tower that one language layer adds to its output at the visual tokens (DeepStack)."""

    places: Tensor
    """[N] int64, distinct rows of the hidden states [S, B, H] as [S B, H]. Under sequence parallelism S is this rank's
    part."""
    features: Tensor
    """[N, H] features."""

    def add_to(self, hidden: Tensor) -> Tensor:
        """Return the hidden states [S, B, H] with the features added; carries gradient to both."""
        return hidden.flatten(0, 1).index_add(0, self.places, self.features.to(hidden.dtype)).view_as(hidden)


@dataclass
class AttentionPass:
    """Instructions of one forward pass to the layers of a stage, and what they record.

    `cache` and `decode_step` are both None in a pass without a cache.
    """

    layout: GroupLayout
    """Layout of the groups in the sequence."""
    recorded_layers: frozenset[int] = frozenset()
    """0-based layers whose attention is recorded."""
    cache: Optional[GroupKVCache] = None
    """Cache that a prompt pass fills and a decoding pass extends."""
    decode_step: Optional[Tensor] = None
    """0-based step of a decoding pass with one token per row of the cache, [1] int64 on the device; None for a pass
    over the whole layout."""
    hidden_states: bool = False
    """True to make the last stage return the input of its LM head instead of logits."""
    records: dict[int, AttentionRecord] = field(default_factory=dict)
    """0-based layer -> its recorded attention, filled by the layers of this stage."""
    decoded_rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """0-based layer -> attention of the fed tokens of a decoding pass, filled by the recorded layers: over the prompt
    [N, P] and over the row's own tokens [N, capacity], float32, summed over this rank's heads and divided by the heads
    of all ranks."""
    deepstack: dict[int, VisualFeatures] = field(default_factory=dict)
    """0-based layer -> features that it adds to its output, filled by the first stage."""

    def read_rows(self, hidden: Tensor) -> Tensor:
        """Return the rows of hidden states that the LM head reads; carries gradient.

        Args:
            hidden: [T or more, 1, H] in a pass over groups, [P, B, H] in one over prompts, [1, N, H] in decoding.

        Returns:
            Each prompt's last row and those of all response tokens [B + N, 1, H] in a pass over groups, each prompt's
            last row [1, B, H] in one over prompts, the argument in decoding.
        """
        if self.decode_step is not None:
            return hidden
        lengths, packed = self.layout.prompt_lengths, self.layout.packed
        if packed is not None:
            return packed.read_rows(hidden[:, 0], lengths)[:, None]
        return hidden[lengths - 1, torch.arange(len(lengths), device=lengths.device)][None]
