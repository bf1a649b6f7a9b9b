"""Target `evidence`: the annotated region for responses that were rewarded (EASE, arXiv 2605.30912). Needs annotations.

It trains attention on the region where the answer came out well, and leaves it alone elsewhere. EASE takes one layer at
two thirds of the depth (`loss.attention_layers`). Departure: the paper smooths the region, and how much is this
project's choice, `SMOOTHING`.
"""

from typing import Any

from torch import Tensor

from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.attention.targets.base import AttentionTarget, shared_row
from megatron_ral.attention.types import RowKeys
from megatron_ral.types import RlBatch

SMOOTHING = 0.1
"""Share of the target that lies evenly on the whole picture."""


class EvidenceTarget(AttentionTarget):
    """Smoothed uniform distribution over the annotated visual tokens, for responses with a reward of at least 0.5."""

    def response_weights(self, advantages_BG: Tensor, rewards_BG: Tensor, accuracy_BG: Tensor) -> Tensor:
        return (rewards_BG >= 0.5).to(advantages_BG)

    def distribution(self, stored: Any, rows: AttentionRows, keys: RowKeys, batch: RlBatch) -> Tensor:
        prompts = batch.groups.prompts
        box, picture = (mask.to(rows.attention.dtype) for mask in (prompts.target_mask, prompts.visual_mask))
        box, picture = (part / part.sum(dim=-1, keepdim=True).clamp(min=1.0) for part in (box, picture))
        smoothed = (1 - SMOOTHING) * box + SMOOTHING * picture
        return shared_row(smoothed * prompts.is_annotated[:, None], rows, keys)

    def weights(self, batch: RlBatch, negative_weight: float) -> Tensor:
        return batch.attention_advantages[..., None] * batch.groups.prompts.is_annotated[:, None, None]


TARGET = EvidenceTarget()
