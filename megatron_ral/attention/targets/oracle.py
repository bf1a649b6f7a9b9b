"""Target `oracle`: the annotated box, uniformly. A control that needs annotations, not a method."""

from typing import Any

from torch import Tensor

from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.attention.targets.base import AttentionTarget, shared_row
from megatron_ral.attention.types import RowKeys
from megatron_ral.types import RlBatch


class OracleTarget(AttentionTarget):
    """Uniform distribution over the annotated visual tokens. Every row of an annotated prompt has weight 1."""

    def distribution(self, stored: Any, rows: AttentionRows, keys: RowKeys, batch: RlBatch) -> Tensor:
        box = batch.groups.prompts.target_mask.to(rows.attention.dtype)
        return shared_row(box / box.sum(dim=-1, keepdim=True).clamp(min=1.0), rows, keys)

    def weights(self, batch: RlBatch, negative_weight: float) -> Tensor:
        return batch.groups.prompts.is_annotated[:, None, None].float()


TARGET = OracleTarget()
