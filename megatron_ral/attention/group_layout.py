"""Group layout [prompts | responses], and the queries and keys that a layer records in it.

A prompt and its G responses are one group. Responses attend to the prompt and to themselves. The prompt never sees a
response, so the layout is exact, not an approximation, and the prompt is computed once per group. (Published for text
as Prefix Grouper, arXiv 2506.05433.)

A pass over groups reads one row of T tokens without padding: the prompts of all groups one after the other, then all
responses in the order of groups. Attention alone pads them again (`packing.py`).
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Optional

import torch
from torch import Tensor

from megatron_ral.attention.packing import Packing, take
from megatron_ral.attention.types import QueryPosition, RowQK
from megatron_ral.types import GroupBatch


@dataclass(frozen=True)
class PackedGroups:
    """Places of the tokens of a pass over whole groups."""

    prompts: Packing
    """Prompts, padded to [B, P]."""
    responses: Packing
    """Responses, padded to [B, G, R]."""
    rows: Packing
    """All response tokens of a group as one sequence, padded to [B, W]."""
    predicting: Tensor
    """Row that predicts each response token, [responses.num_tokens] int64. Row b G + g is the last one of prompt b, and
    row B G + i is that of response token i."""

    @classmethod
    def of(cls, prompt_lengths: Tensor, response_lengths: Tensor, P: int, R: int) -> "PackedGroups":
        """Return the places of groups by their lengths [B] and [B, G] in host memory, padded to P and R."""
        per_group, lengths = response_lengths.sum(dim=-1), response_lengths.flatten()
        predicting = torch.arange(-1, int(lengths.sum()) - 1, device=lengths.device) + lengths.numel()
        predicting[lengths.cumsum(0) - lengths] = torch.arange(lengths.numel(), device=lengths.device)
        return cls(
            Packing.of(prompt_lengths, P),
            Packing.of(response_lengths, R),
            Packing.of(per_group, int(per_group.max())),
            predicting,
        )

    @classmethod
    def of_batch(cls, groups: GroupBatch) -> "PackedGroups":
        """Return the places of a batch in host memory."""
        P, R = groups.prompts.input_ids.shape[1], groups.response_ids.shape[2]
        return cls.of(groups.prompts.prompt_lengths, groups.response_lengths, P, R)

    @property
    def num_tokens(self) -> int:
        """Number of tokens T of the pass."""
        return self.prompts.num_tokens + self.responses.num_tokens

    def split(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens [T or more, ...] of a pass as those of the prompts and those of the responses."""
        return hidden[: self.prompts.num_tokens], hidden[self.prompts.num_tokens : self.num_tokens]

    def token_ids(self, groups: GroupBatch) -> Tensor:
        """Return the tokens of a pass, [T] int64."""
        return torch.cat([self.prompts.pack(groups.prompts.input_ids), self.responses.pack(groups.response_ids)])

    def position_ids(self, groups: GroupBatch) -> Tensor:
        """Return their rotary positions, [3, T] int64. Every response continues from its prompt."""
        B, G, R = groups.response_ids.shape
        steps = torch.arange(R, device=groups.response_ids.device) + groups.prompts.next_position[:, None, None]
        own = self.responses.pack(steps.expand(B, G, R).contiguous())
        prompts = self.prompts.pack(groups.prompts.position_ids.permute(1, 2, 0).contiguous())
        return torch.cat([prompts.t(), own.expand(3, -1)], dim=1)

    def read_rows(self, hidden: Tensor, prompt_lengths: Tensor) -> Tensor:
        """Return the rows that the LM head reads: each prompt's last one, then those of all response tokens.

        Args:
            hidden: Hidden states of the pass, [T or more, H].
            prompt_lengths: [B] int64.

        Returns:
            [B + responses.num_tokens, H] with gradient.
        """
        prompts, responses = self.split(hidden)
        return torch.cat([take(prompts, prompt_lengths.cumsum(0) - 1), responses])

    def predicting_rows(self, read: Tensor) -> Tensor:
        """Return the rows that predict the response tokens, [responses.num_tokens, H] with gradient.

        Args:
            read: Rows of `read_rows`.
        """
        B, G, _ = self.responses.shape
        last, responses = read[:B, None], read[B:]
        return take(torch.cat([last.expand(B, G, -1).flatten(0, 1), responses]), self.predicting)


@dataclass(frozen=True)
class GroupLayout:
    """Lengths of B groups, padded to P prompt tokens and R response tokens. G = 0: prompts alone."""

    prompt_lengths: Tensor
    """Prompt lengths, [B] int64."""
    response_lengths: Tensor
    """Response lengths, [B, G] int64."""
    P: int
    R: int
    packed: Optional[PackedGroups] = None
    """Places of the tokens of a pass. None: the pass is over prompts alone, [P, B], or there is none."""

    @classmethod
    def of(cls, groups: GroupBatch) -> "GroupLayout":
        """Return the layout of a batch, which is in host memory."""
        P, R = groups.prompts.input_ids.shape[1], groups.response_ids.shape[2]
        return cls(groups.prompts.prompt_lengths, groups.response_lengths, P, R, PackedGroups.of_batch(groups))

    @property
    def B(self) -> int:
        return self.response_lengths.shape[0]

    @property
    def G(self) -> int:
        return self.response_lengths.shape[1]

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
            return RowQK(
                self.query_BGRnD, self.prompt_key_BPkD, self.response_key_BGRkD, *rest, layout.response_lengths
            )
        first = self.last_prompt_query_BnD[:, None, None]
        if position is QueryPosition.LAST_PROMPT:
            return RowQK(first, self.prompt_key_BPkD, self.response_key_BGRkD[:, :1, :0], *rest)
        query = torch.cat([first.expand(-1, layout.G, 1, -1, -1), self.query_BGRnD[:, :, :-1]], dim=2)
        return RowQK(query, self.prompt_key_BPkD, self.response_key_BGRkD, *rest, layout.response_lengths)

    def detached(self) -> "AttentionRecord":
        """Return a copy without gradient that keeps no other tensor of the pass alive (queries are views)."""
        return AttentionRecord(*(getattr(self, item.name).detach().clone() for item in fields(self)))
