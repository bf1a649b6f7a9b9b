"""Deciding rows: the row of a response that predicts the first token of its answer.

An average over all rows of a response hides the one row at which the model decides, so attention is reported at that
row too. `rollout/scoring.py` finds the tokens, as `GroupBatch.answer_tokens`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ral.attention.types import QueryPosition
from megatron_ral.types import GroupBatch


def deciding_rows(groups: GroupBatch, position: QueryPosition) -> Tensor:
    """Return the mask of the deciding rows among the rows of a query position, [B, G, R] bool.

    A response has one deciding row or none. It has none without an answer. At `RESPONSE` it has none either where the
    answer begins with the first token, which the prompt's last row predicts.

    Args:
        groups: Groups. `answer_tokens` None gives no deciding row.
        position: `RESPONSE` or `PREDICTING`.
    """
    mask = groups.response_mask
    if groups.answer_tokens is None:
        return torch.zeros_like(mask)
    lag = int(position is QueryPosition.RESPONSE)
    tokens = torch.arange(lag, mask.shape[2] + lag, device=mask.device)
    return (tokens == groups.answer_tokens[..., None]) & mask


@dataclass(frozen=True)
class TargetShares:
    """Sums of the share of visual attention on the target, each with the number of values, and all without gradient."""

    all_rows: tuple[Tensor, Tensor]
    """Over all response rows of annotated prompts."""
    deciding: tuple[Tensor, Tensor]
    """Over deciding rows of annotated prompts."""
    peak: tuple[Tensor, Tensor]
    """Over responses of annotated prompts: the largest share among the rows of the response."""

    def named(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (sum, count) by the name in logs and tables."""
        return {"target_mass": self.all_rows, "target_deciding": self.deciding, "target_peak": self.peak}


def row_sums(values_KBGR: Tensor, groups: GroupBatch, mask_BGR: Tensor) -> tuple[Tensor, Tensor, TargetShares]:
    """Sum values over rows, all in a few operations.

    Args:
        values_KBGR: Values of each row at `QueryPosition.RESPONSE`. The last are the shares of visual attention on the
            target (`mass.row_masses`).
        groups: Groups of the rows.
        mask_BGR: Mask of the rows that count.

    Returns:
        (sums of all values over the rows that count, [K]; their number; shares).
    """
    annotated = mask_BGR & groups.prompts.is_annotated[:, None, None]
    masks = torch.stack([mask_BGR, annotated, annotated & deciding_rows(groups, QueryPosition.RESPONSE)])
    masked = values_KBGR[:, None] * masks
    sums, counts = masked.sum(dim=(2, 3, 4)), masks.sum(dim=(1, 2, 3))
    peaks = masked[-1, 1].amax(dim=-1).sum(), annotated.any(dim=-1).sum()
    return sums[:, 0], counts[0], TargetShares((sums[-1, 1], counts[1]), (sums[-1, 2], counts[2]), peaks)
