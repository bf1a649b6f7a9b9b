"""Keys and values of responses in the making: a prompt's once per group, each response's own; what ended leaves.

The cache knows which rows a decoding pass feeds. At first these are B G in order, prompt by prompt; once responses have
left (`keep`), N rows of B prompts with unequal numbers of responses.
"""

from typing import Optional

import torch
from torch import Tensor


class GroupKVCache:
    """Cache of one batch on one stage. Filled by the layers, each with its own keys and values.

    Args:
        prompt_lengths: [B] int64, on the device of the keys.
        group_size: responses of each prompt.
    """

    BLOCK = 64
    """Steps by which the responses' part grows. Growing copies it: at most 1 / BLOCK of what attention reads."""

    def __init__(self, prompt_lengths: Tensor, group_size: int):
        self.prompt_lengths = prompt_lengths
        self.prompt: dict[int, tuple[Tensor, Tensor]] = {}
        """layer -> keys and values [B, k, P, D]"""
        self.response: dict[int, tuple[Tensor, Tensor]] = {}
        """layer -> keys and values [N, k, capacity, D], valid up to the current step"""
        self._arrange(torch.arange(len(prompt_lengths)).repeat_interleave(group_size))

    def _arrange(self, row_prompt: Tensor) -> None:
        counts = torch.bincount(row_prompt, minlength=len(self.prompt_lengths))
        within = torch.arange(len(row_prompt)) - (counts.cumsum(0) - counts)[row_prompt]
        self.row_prompt = row_prompt
        """[N] int64 in the host's memory, ascending: the prompt of each row."""
        self.width = int(counts.max())
        """Responses of the prompt that has most."""
        full = bool((counts == self.width).all())
        self._places = None if full else (row_prompt * self.width + within).to(self.prompt_lengths.device)
        self._hidden: Optional[Tensor] = None

    def store_prompt(self, layer: int, key_BPkD: Tensor, value_BPkD: Tensor) -> None:
        """Keep a layer's prompt keys and values (copies: a view would keep the mixed q, k, v alive)."""
        self.prompt[layer] = (key_BPkD.transpose(1, 2).contiguous(), value_BPkD.transpose(1, 2).contiguous())

    def append(self, layer: int, step: int, key_NkD: Tensor, value_NkD: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token per row at `step`; returns all own keys and values [N, k, step + 1, D] up to and including
        it."""
        held = self.response.get(layer, (None, None))
        if held[0] is None or step == held[0].shape[2]:
            held = self.response[layer] = tuple(map(self._grown, held, (key_NkD, value_NkD)))
        keys, values = held
        keys[:, :, step], values[:, :, step] = key_NkD, value_NkD
        return keys[:, :, : step + 1], values[:, :, : step + 1]

    def _grown(self, held: Optional[Tensor], new: Tensor) -> Tensor:
        N, k, D = new.shape
        length = 0 if held is None else held.shape[2]
        larger = new.new_empty(N, k, length + self.BLOCK, D)
        if held is not None:
            larger[:, :, :length] = held
        return larger

    def keep(self, rows: Tensor, prompts: Optional[Tensor] = None) -> None:
        """Go on with some of the rows and prompts; the rest is let go.

        Args:
            rows: ascending indices of rows, in the host's memory.
            prompts: ascending indices of prompts, those of `rows` among them; None: all, so that theirs are not copied.
        """
        row_prompt = self.row_prompt[rows]
        there = rows.to(self.prompt_lengths.device)
        for layer, parts in self.response.items():
            self.response[layer] = tuple(part.index_select(0, there) for part in parts)
        if prompts is not None:
            row_prompt = torch.searchsorted(prompts, row_prompt)
            there = prompts.to(self.prompt_lengths.device)
            self.prompt_lengths = self.prompt_lengths[there]
            longest = int(self.prompt_lengths.max())
            for layer, parts in self.prompt.items():
                self.prompt[layer] = tuple(part[:, :, :longest].index_select(0, there) for part in parts)
        self._arrange(row_prompt)

    def by_prompt(self, rows: Tensor) -> Tensor:
        """[N, ...] -> [B, width, ...]; places without a response are zero."""
        shape = (len(self.prompt_lengths), self.width, *rows.shape[1:])
        if self._places is None:
            return rows.view(shape)
        return rows.new_zeros(shape[0] * shape[1], *shape[2:]).index_copy_(0, self._places, rows).view(shape)

    def by_row(self, places: Tensor) -> Tensor:
        """[B, width, ...] -> [N, ...]: inverse of `by_prompt`."""
        places = places.flatten(0, 1)
        return places if self._places is None else places.index_select(0, self._places)

    def hidden_keys(self, P: int) -> Tensor:
        """[B, P] bool: True at the padding of a prompt."""
        if self._hidden is None:
            self._hidden = torch.arange(P, device=self.prompt_lengths.device) >= self.prompt_lengths[:, None]
        return self._hidden
