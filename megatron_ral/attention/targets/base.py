"""Protocol of an attention target: the distribution that a row is compared with, and the weight of the row.

The paper's target is the default of every method. A target is a subclass named `TARGET` in a file of its own, and
one row of `registry.TARGETS`, which says which pass, keys and storage it works with.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ral.attention.distribution import attention_distribution
from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.attention.types import QueryPosition, RowKeys
from megatron_ral.types import GroupBatch, RlBatch


class AttentionTarget:
    """Target whose rows are those of another pass, weighted by the advantage of their response (RAL paper, eq. 3)."""

    divergence: Optional[str] = None
    """Name of `divergence.DIVERGENCES` that the target prescribes. None: `loss.attention_divergence` chooses."""

    def position(self, setting: QueryPosition) -> QueryPosition:
        """Return the query position whose rows carry the gradient.

        Args:
            setting: Query position of `loss.attention_row`, at which the target's pass is read.
        """
        return setting

    def summarize(self, rows: AttentionRows, keys: RowKeys, groups: GroupBatch) -> Tensor:
        """Return what is stored of the target's pass until the update: here the distributions [B, G, R, S]."""
        return rows.distribution(keys)

    def combine(self, stored: Any, advantages_BG: Tensor) -> Any:
        """Turn what was stored into what a micro-batch carries, now that advantages are known."""
        return stored

    def response_weights(self, advantages_BG: Tensor, rewards_BG: Tensor, accuracy_BG: Tensor) -> Tensor:
        """Return the weight of each response in the attention term, [B, G]: here its advantage.

        A control permutes them within each group (`loss.attention_advantages`).

        Args:
            advantages_BG: Advantages of the rewards.
            rewards_BG: Rewards.
            accuracy_BG: Accuracy part of the rewards, in [0, 1].
        """
        return advantages_BG

    def distribution(self, stored: Any, rows: AttentionRows, keys: RowKeys, batch: RlBatch) -> Tensor:
        """Return the target distributions over `keys`, which broadcast to [B, G, R, S]. No gradient.

        Args:
            stored: Result of `combine`. None where the target needs no pass.
            rows: Rows of the update's own pass.
            keys: Keys that the distributions are made of.
            batch: Micro-batch of the update.
        """
        return stored

    def weights(self, batch: RlBatch, negative_weight: float) -> Tensor:
        """Return the weight of every row, which broadcasts to [B, G, R]. A positive weight pulls towards the target.

        Args:
            batch: Micro-batch of the update. Its `attention_advantages` come from `response_weights`.
            negative_weight: Factor of negative advantages (`loss.attention_negative_weight`).
        """
        advantages = batch.attention_advantages
        if negative_weight == 1.0:
            return advantages[..., None]
        return torch.where(advantages < 0, advantages * negative_weight, advantages)[..., None]


def shared_row(row_BP: Tensor, rows: AttentionRows, keys: RowKeys) -> Tensor:
    """Return one distribution over prompt keys as the target of all rows of its group, [B, 1, 1 or R, S].

    A response's own token is none of the prompt's. At other query positions it may be, and is left out.
    """
    row = F.pad(row_BP, (0, rows.attention.shape[-1] - row_BP.shape[-1]))[:, None, None]
    if rows.position is QueryPosition.RESPONSE:
        return row
    return attention_distribution(row.expand(-1, -1, rows.attention.shape[2], -1), keys)[0]
