"""Target `hindsight`: where the successful responses of the same prompt looked later. Experimental, this project's.

Causality gives all responses of a prompt the same prompt keys, so that their rows can be compared over these. The row
of the prompt's last token, which precedes every response, is pulled towards their mean.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.attention.targets.base import AttentionTarget, shared_row
from megatron_ral.attention.types import QueryPosition, RowKeys
from megatron_ral.types import GroupBatch, RlBatch


class HindsightTarget(AttentionTarget):
    """Advantage-weighted mean prompt row of the responses with a positive advantage, for the prompt's last row."""

    def position(self, setting: QueryPosition) -> QueryPosition:
        return QueryPosition.LAST_PROMPT

    def summarize(self, rows: AttentionRows, keys: RowKeys, groups: GroupBatch) -> Tensor:
        return mean_prompt_row(rows.distribution(keys), groups.response_mask, rows.layout.P)

    def combine(self, stored: Tensor, advantages_BG: Tensor) -> Tensor:
        return success_row(stored, advantages_BG.to(stored.device))

    def distribution(self, stored: Any, rows: AttentionRows, keys: RowKeys, batch: RlBatch) -> Tensor:
        return shared_row(stored, rows, keys)

    def weights(self, batch: RlBatch, negative_weight: float) -> Tensor:
        return batch.attention_advantages.clamp(min=0).sum(dim=1)[:, None, None]


def mean_prompt_row(distribution_BGRS: Tensor, mask_BGR: Tensor, prompt_length: int) -> Tensor:
    """Return each response's attention distribution over the prompt, averaged over its rows.

    Args:
        distribution_BGRS: Distributions over prompt keys (mass on other keys 0).
        mask_BGR: Mask of the real response tokens, bool.
        prompt_length: P, the first columns.

    Returns:
        [B, G, P]. Zeros for a response without rows. No gradient.
    """
    weights = mask_BGR.to(distribution_BGRS.dtype)
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1.0)
    return torch.einsum("bgr,bgrp->bgp", weights, distribution_BGRS.detach()[..., :prompt_length])


def success_row(rows_BGP: Tensor, advantages_BG: Tensor) -> Tensor:
    """Return the advantage-weighted mean of the successful responses' rows.

        target[b] = sum_{g: A > 0} A[b, g] row[b, g] / sum_{g: A > 0} A[b, g]

    Args:
        rows_BGP: Rows of `mean_prompt_row`.
        advantages_BG: Group-relative advantages.

    Returns:
        [B, P]. Zeros for a group without a positive advantage. No gradient.
    """
    success = advantages_BG.clamp(min=0).to(rows_BGP.dtype)
    total = success.sum(dim=1, keepdim=True)
    return torch.einsum("bg,bgp->bp", success / torch.where(total > 0, total, 1.0), rows_BGP.detach())


TARGET = HindsightTarget()
