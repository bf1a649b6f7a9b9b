"""What travels with one forward pass through the layers of a stage.

`AttentionPass` takes the place of the attention mask: megatron-core hands it untouched to every core attention. It is
made anew for each pass, so that several micro-batches can be in flight in a pipeline.
"""

from dataclasses import dataclass, field
from typing import Optional

from torch import Tensor

from megatron_ral.attention.group_layout import AttentionRecord, GroupLayout
from megatron_ral.models.kv_cache import GroupKVCache


@dataclass(frozen=True)
class VisualFeatures:
    """Features of the vision tower that a language layer adds at the visual tokens (DeepStack)."""

    sequence: Tensor
    """[N] int64 places in the sequence."""
    batch: Tensor
    """[N] int64 places in the batch."""
    features: Tensor
    """[N, H]."""

    def add_to(self, hidden: Tensor) -> Tensor:
        """[S, B, H] hidden states with the features added."""
        return hidden.index_put((self.sequence, self.batch), self.features.to(hidden.dtype), accumulate=True)

    def part(self, start: int, stop: int) -> "VisualFeatures":
        """Those of one stretch of the sequence, counted from its start (sequence parallelism)."""
        mine = (self.sequence >= start) & (self.sequence < stop)
        return VisualFeatures(self.sequence[mine] - start, self.batch[mine], self.features[mine])


@dataclass
class AttentionPass:
    """What one forward pass asks of the core attentions, and what they hand back."""

    layout: GroupLayout
    recorded_layers: frozenset[int] = frozenset()
    """0-based layers whose response rows are recorded."""
    cache: Optional[GroupKVCache] = None
    decode_step: Optional[int] = None
    """None: the sequence is the whole group layout. A number: one token at that step for each row of the cache."""
    hidden_states: bool = False
    """The last stage returns what its LM head would read in place of logits."""
    records: dict[int, AttentionRecord] = field(default_factory=dict)
    """Filled by the layers of this stage."""
    deepstack: dict[int, VisualFeatures] = field(default_factory=dict)
    """0-based layer -> what it adds to its output; filled by the first stage."""
