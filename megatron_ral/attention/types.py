"""Values of the attention computations: which rows, from which queries and keys, over which keys."""

from enum import Enum
from typing import NamedTuple, Optional

from torch import Tensor


class QueryPosition(Enum):
    """Query positions whose attention rows are taken. The values are those of `loss.attention_row`."""

    RESPONSE = "token"
    """Row of each response token itself (the paper, rows P + 1 .. T)."""
    PREDICTING = "predictor"
    """Row one place earlier, which predicts the response token."""
    LAST_PROMPT = "last_prompt"
    """Row of the prompt's last token, once per group."""


class RowQK(NamedTuple):
    """Queries of rows and the keys they may see, after rotary embedding, for this tensor-parallel rank's heads.

    Row r of response g sees the prompt's first `prompt_lengths` keys and the first r + 1 - lag keys of its response.
    """

    query_BGRnD: Tensor
    prompt_key_BPkD: Tensor
    response_key_BGTkD: Tensor
    """k divides n (grouped-query attention). T = 0 where rows see the prompt alone."""
    prompt_lengths_B: Tensor
    lag: int
    """0: a row sees its own token's key. 1: rows stand one place earlier (`QueryPosition.PREDICTING`)."""
    scale: float
    """Softmax scale, usually 1 / sqrt(D)."""
    num_heads: int
    """Number of heads of all tensor-parallel ranks together."""
    num_rows_BG: Optional[Tensor] = None
    """Rows of each response that are no padding, int64. None: all. A backend may leave padding 0."""

    @property
    def heads_per_key(self) -> int:
        """Number m of query heads that share a key/value head."""
        return self.query_BGRnD.shape[3] // self.prompt_key_BPkD.shape[2]

    @property
    def num_keys(self) -> int:
        """Number of columns of a row, S = P + T."""
        return self.prompt_key_BPkD.shape[1] + self.response_key_BGTkD.shape[2]


class RowKeys(NamedTuple):
    """Keys over which a row's distribution is renormalised. All other keys are left out first."""

    columns_BS: Tensor
    """Mask of the keys that count, bool."""
    own_BR: Optional[Tensor] = None
    """Column of each row's own token, int64, which is left out too. None: nothing more is left out."""


Block = tuple[slice, slice, slice]
"""Slices of b, g and r: some of the rows of a batch."""

ALL_ROWS: Block = (slice(None), slice(None), slice(None))
"""Block of all rows."""
