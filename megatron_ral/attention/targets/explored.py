"""Target `explored`: where each response looked while it was sampled, under its own noise (`attention/exploration.py`).

This is the paper's loss with the explored rows in the place of the policy's own. A response with a positive advantage
pulls attention to where it looked, one with a negative advantage pushes it away. Unlike `old` it has a signal of first
order in the first update, because the rows differ from the policy's by the noise. Source: this project.
"""

from typing import Any

from torch import Tensor

from megatron_ral.attention.distribution import attention_distribution
from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.attention.targets.base import AttentionTarget
from megatron_ral.attention.types import QueryPosition, RowKeys
from megatron_ral.types import RlBatch


class ExploredTarget(AttentionTarget):
    """Rows that decoding recorded, renormalised over the keys."""

    def position(self, setting: QueryPosition) -> QueryPosition:
        return QueryPosition.PREDICTING

    def distribution(self, stored: Any, rows: AttentionRows, keys: RowKeys, batch: RlBatch) -> Tensor:
        return attention_distribution(stored, keys)[0]


TARGET = ExploredTarget()
