"""Group layout [prompt | response 1 | ... | response G], and the queries and keys that a layer records in it.

A prompt and its G responses are one sequence of P + G R tokens. Responses attend to the prompt and to themselves. The
prompt never sees a response, so the layout is exact, not an approximation, and the prompt is computed once per group.
(Published for text as Prefix Grouper, arXiv 2506.05433.)
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Optional

import torch
from torch import Tensor

from megatron_ral.attention.types import QueryPosition, RowQK
from megatron_ral.types import GroupBatch


@dataclass(frozen=True)
class GroupLayout:
    """Lengths of B groups, padded to P prompt tokens and R response tokens. G = 0: prompts alone."""

    prompt_lengths: Tensor
    """Prompt lengths, [B] int64."""
    response_lengths: Tensor
    """Response lengths, [B, G] int64."""
    P: int
    R: int
    prompt_tokens: Optional[int] = None
    """Sum of `prompt_lengths` where the host knows it, so that it need not be read from the device."""

    @classmethod
    def of(cls, groups: GroupBatch) -> "GroupLayout":
        """Return the layout of a batch."""
        prompts = groups.prompts
        return cls(
            prompts.prompt_lengths,
            groups.response_lengths,
            prompts.input_ids.shape[1],
            groups.response_ids.shape[2],
            sum(len(prompt.input_ids) for prompt in prompts.prompts),
        )

    @property
    def B(self) -> int:
        return self.response_lengths.shape[0]

    @property
    def G(self) -> int:
        return self.response_lengths.shape[1]

    @property
    def num_prompt_tokens(self) -> int:
        """Sum of the prompts' lengths."""
        return int(self.prompt_lengths.sum()) if self.prompt_tokens is None else self.prompt_tokens

    @property
    def sequence_length(self) -> int:
        """Number of tokens of a padded group, P + G R."""
        return self.P + self.G * self.R

    @cached_property
    def visible_BGRS(self) -> Tensor:
        """Keys [prompt; own response] that a response row sees, itself included: [B, G, R, P + R] bool."""
        device = self.prompt_lengths.device
        prompt = torch.arange(self.P, device=device) < self.prompt_lengths[:, None]
        steps = torch.arange(self.R, device=device)
        causal = steps[None, :] <= steps[:, None]
        prompt = prompt[:, None, None, :].expand(self.B, self.G, self.R, self.P)
        own = causal[None, None].expand(self.B, self.G, self.R, self.R)
        return torch.cat([prompt, own], dim=-1)

    def own_columns(self, position: QueryPosition) -> Tensor:
        """Return the column of each row's own token, [B, R] int64 ([B, 1] for `LAST_PROMPT`)."""
        steps = torch.arange(self.P, self.P + self.R, device=self.prompt_lengths.device).expand(self.B, self.R)
        if position is QueryPosition.RESPONSE:
            return steps
        last_prompt = (self.prompt_lengths - 1)[:, None]
        return last_prompt if position is QueryPosition.LAST_PROMPT else torch.cat([last_prompt, steps[:, :-1]], dim=1)


@dataclass(frozen=True)
class AttentionRecord:
    """Queries and keys of one layer after rotary embedding, for this tensor-parallel rank's heads."""

    query_BGRnD: Tensor
    """Queries of the response tokens."""
    last_prompt_query_BnD: Tensor
    """Queries of each prompt's last token, whose row predicts the first response token."""
    prompt_key_BPkD: Tensor
    response_key_BGRkD: Tensor

    def rows(self, position: QueryPosition, layout: GroupLayout, scale: float, num_heads: int) -> RowQK:
        """Return the rows at a query position.

        Args:
            position: Which rows.
            layout: Layout of the recorded pass.
            scale: Softmax scale.
            num_heads: Number of heads of all tensor-parallel ranks.

        Returns:
            Views of the record, which carry its gradient. R = G = 1 for `LAST_PROMPT`.
        """
        lag = int(position is QueryPosition.PREDICTING)
        rest = layout.prompt_lengths, lag, scale, num_heads
        if position is QueryPosition.RESPONSE:
            return RowQK(self.query_BGRnD, self.prompt_key_BPkD, self.response_key_BGRkD, *rest)
        first = self.last_prompt_query_BnD[:, None, None]
        if position is QueryPosition.LAST_PROMPT:
            return RowQK(first, self.prompt_key_BPkD, self.response_key_BGRkD[:, :1, :0], *rest)
        query = torch.cat([first.expand(-1, layout.G, 1, -1, -1), self.query_BGRnD[:, :, :-1]], dim=2)
        return RowQK(query, self.prompt_key_BPkD, self.response_key_BGRkD, *rest)

    def detached(self) -> "AttentionRecord":
        """Return a copy without gradient that keeps no other tensor of the pass alive (queries are views)."""
        return AttentionRecord(*(getattr(self, item.name).detach().clone() for item in fields(self)))
