"""The group layout [prompt | response 1 | ... | response G] and what travels with one forward pass.

A prompt and its G responses are one sequence of P + G R tokens. Responses attend to the prompt and to themselves; the
prompt never sees a response, so the layout is exact, not an approximation, and the prompt's layers run once per group.
(Published for text as Prefix Grouper, arXiv 2506.05433.)

`AttentionPass` takes the place of the attention mask: megatron-core hands it untouched to every core attention. It is
made anew for each pass, so that several micro-batches can be in flight in a pipeline.
"""

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from megatron_ral.attention.rows import RowQK

ROW_KINDS = ("token", "predictor", "last_prompt")
"""Rows an attention policy is taken from: `token`: of response token r itself (the paper); `predictor`: of the place that
predicts it, one earlier; `last_prompt`: of the prompt's last token alone, once per group."""


@dataclass(frozen=True)
class GroupLayout:
    """Lengths of B groups, padded to P prompt tokens and R response tokens. G = 0: prompts alone."""

    prompt_lengths: Tensor
    """[B] int64."""
    response_lengths: Tensor
    """[B, G] int64."""
    P: int
    R: int

    @property
    def B(self) -> int:
        return self.response_lengths.shape[0]

    @property
    def G(self) -> int:
        return self.response_lengths.shape[1]

    @property
    def sequence_length(self) -> int:
        return self.P + self.G * self.R

    @cached_property
    def visible_BGRS(self) -> Tensor:
        """[B, G, R, P + R] bool: keys [prompt; own response] that a response row sees, itself included."""
        device = self.prompt_lengths.device
        prompt = torch.arange(self.P, device=device) < self.prompt_lengths[:, None]
        steps = torch.arange(self.R, device=device)
        causal = steps[None, :] <= steps[:, None]
        prompt = prompt[:, None, None, :].expand(self.B, self.G, self.R, self.P)
        own = causal[None, None].expand(self.B, self.G, self.R, self.R)
        return torch.cat([prompt, own], dim=-1)

    def own_columns(self, rows: str) -> Tensor:
        """[B, R] int64 ([B, 1] for `last_prompt`): the column of each row's own token. `rows`: see `ROW_KINDS`."""
        last_prompt = (self.prompt_lengths - 1)[:, None]
        steps = self.P + torch.arange(self.R, device=last_prompt.device).expand(self.B, self.R)
        return {
            "token": steps,
            "predictor": torch.cat([last_prompt, steps[:, :-1]], dim=1),
            "last_prompt": last_prompt,
        }[rows]


@dataclass(frozen=True)
class AttentionRecord:
    """Queries and keys of one layer, after rotary embedding, this rank's heads."""

    query_BGRnD: Tensor
    """Of the response tokens."""
    last_prompt_query_BnD: Tensor
    """Of each prompt's last token, whose row predicts the first response token."""
    prompt_key_BPkD: Tensor
    response_key_BGRkD: Tensor

    def rows(self, kind: str, layout: GroupLayout, scale: float, num_heads: int) -> RowQK:
        """The rows of a kind of `ROW_KINDS` as `functional.attention_rows` takes them.

        Args:
            scale: softmax scale.
            num_heads: heads of all tensor ranks.
        """
        rest = layout.prompt_lengths, int(kind == "predictor"), scale, num_heads
        if kind == "token":
            return RowQK(self.query_BGRnD, self.prompt_key_BPkD, self.response_key_BGRkD, *rest)
        first = self.last_prompt_query_BnD[:, None, None]
        if kind == "last_prompt":
            return RowQK(first, self.prompt_key_BPkD, self.response_key_BGRkD[:, :1, :0], *rest)
        query = torch.cat([first.expand(-1, layout.G, 1, -1, -1), self.query_BGRnD[:, :, :-1]], dim=2)
        return RowQK(query, self.prompt_key_BPkD, self.response_key_BGRkD, *rest)

    def detached(self) -> "AttentionRecord":
        """A copy without gradient that keeps nothing else of the pass alive (queries here are views of all tokens')."""
        return AttentionRecord(*(getattr(self, item.name).detach().clone() for item in fields(self)))
