"""KV cache for group decoding: prompt keys once per group, response keys per row, finished rows dropped.

Layers with linear attention have a state in place of keys and values: the last inputs of a convolution, and a matrix
per head. Each prompt leaves one, and every row continues a copy of it.

A row is one response that is being generated. At first a batch of B prompts has B G rows, prompt by prompt. After
`select` it has N rows, and prompts may have different numbers of them.
"""

from typing import Optional

import torch
from torch import Tensor

from megatron_ral.attention.exploration import AttentionNoise, VisualNoise


def _chosen(pair: tuple[Tensor, Tensor], places: Tensor) -> tuple[Tensor, Tensor]:
    """Return copies of the given rows of two tensors."""
    first, second = pair
    return first.index_select(0, places), second.index_select(0, places)


class GroupKVCache:
    """Cache of one batch on one pipeline stage. Every layer stores its own keys and values.

    Args:
        prompt_lengths: [B] int64, on the device of the keys.
        group_size: Number of responses of each prompt.
        feeds_prompt_end: True if the last token of each prompt is fed again as the first of each row, so that states
            must not hold it.
    """

    BLOCK = 16
    """Steps by which the response part grows on the CPU. Growing copies it, at most 1 / BLOCK of what is read."""
    LEAST = 256
    """Steps that it has at first on a GPU, where it doubles, because every growth makes a recorded pass useless."""

    def __init__(self, prompt_lengths: Tensor, group_size: int, feeds_prompt_end: bool = False):
        self.prompt_lengths = prompt_lengths
        """[B] int64."""
        self.state_lengths = prompt_lengths - int(feeds_prompt_end)
        """Number of prompt tokens that states hold before the first row is fed, [B] int64."""
        self.states: dict[int, tuple[Tensor, Tensor]] = {}
        """0-based layer -> states of the prompts: inputs [B, kernel - 1, channels] and matrices [B, h, Dk, Dv]."""
        self.continued: dict[int, tuple[Tensor, Tensor]] = {}
        """0-based layer -> states of the rows, like those of the prompts with N in place of B."""
        self.prompt: dict[int, tuple[Tensor, Tensor]] = {}
        """0-based layer -> keys and values of the prompts [B, k, P, D]."""
        self.response: dict[int, tuple[Tensor, Tensor]] = {}
        """0-based layer -> keys and values of the responses [N, k, capacity, D], zeros behind the current step."""
        self.capacity = 0
        """Steps that there is room for."""
        self.noise: Optional[AttentionNoise] = None
        """Noise of the rows, on the device of the keys. None: they have none."""
        self._arrange(torch.arange(len(prompt_lengths)).repeat_interleave(group_size))

    def _arrange(self, row_prompt: Tensor) -> None:
        counts = torch.bincount(row_prompt, minlength=len(self.prompt_lengths))
        within = torch.arange(len(row_prompt)) - (counts.cumsum(0) - counts)[row_prompt]
        self.row_prompt = row_prompt
        """[N] int64 on the host, ascending: index of each row's prompt."""
        self.width = int(counts.max())
        """Largest number of rows of one prompt."""
        full = bool((counts == self.width).all())
        self._places = None if full else (row_prompt * self.width + within).to(self.prompt_lengths.device)
        self._hidden: Optional[Tensor] = None
        self._padding_mask: Optional[tuple[Optional[Tensor]]] = None
        self._own_hidden: Optional[Tensor] = None
        self._noise_on_keys: dict[int, VisualNoise] = {}
        """Place of a layer's noise (`AttentionNoise.place_of`) -> its noise on every key."""

    def store_prompt(self, layer: int, key_BPkD: Tensor, value_BPkD: Tensor) -> None:
        """Store a layer's prompt keys and values.

        They are copied, because a view would hold the fused queries, keys and values in memory.
        """
        self.prompt[layer] = (key_BPkD.transpose(1, 2).contiguous(), value_BPkD.transpose(1, 2).contiguous())

    def store_state(self, layer: int, tail: Tensor, matrices: Tensor) -> None:
        """Store the state that the prompts leave in a layer, see `states`."""
        self.states[layer] = (tail.contiguous(), matrices)

    def row_states(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the states of the rows in a layer, which the caller changes in place. The first call makes them."""
        if layer not in self.continued:
            places = self.row_prompt.to(self.prompt_lengths.device)
            self.continued[layer] = _chosen(self.states.pop(layer), places)
        return self.continued[layer]

    def reserve(self, step: int) -> bool:
        """Make room for the tokens of a 0-based step, and return whether tensors were replaced for it."""
        if step < self.capacity:
            return False
        if self.prompt_lengths.is_cuda:
            self.capacity = max(self.LEAST, 2 * self.capacity, step + 1)
        else:
            self.capacity = (step // self.BLOCK + 1) * self.BLOCK
        for layer, (keys, values) in self.response.items():
            self.response[layer] = self._grown(keys), self._grown(values)
        return True

    def start_step(self, step: Tensor) -> None:
        """Begin a step, [1] int64 on the device of the keys, in which every layer appends a token of each row."""
        self._own_hidden = torch.arange(self.capacity, device=step.device) > step

    def append(self, layer: int, step: Tensor, key_NkD: Tensor, value_NkD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store one token of each row at a step.

        Returns:
            Response keys and values [N, k, capacity, D] of each row, and [capacity] bool, True behind this step.
        """
        if layer not in self.response:
            N, k, D = key_NkD.shape
            self.response[layer] = (
                key_NkD.new_zeros(N, k, self.capacity, D),
                value_NkD.new_zeros(N, k, self.capacity, D),
            )
        keys, values = self.response[layer]
        keys.index_copy_(2, step, key_NkD[:, :, None])
        values.index_copy_(2, step, value_NkD[:, :, None])
        assert self._own_hidden is not None
        return keys, values, self._own_hidden

    def _grown(self, held: Tensor) -> Tensor:
        N, k, length, D = held.shape
        larger = held.new_zeros(N, k, self.capacity, D)  # attention multiplies what it does not see by 0
        larger[:, :, :length] = held
        return larger

    def select(self, rows: Tensor, prompts: Optional[Tensor] = None) -> None:
        """Drop all rows and prompts but the given ones.

        Args:
            rows: Ascending indices of rows, on the host.
            prompts: Ascending indices of prompts, which must include those of `rows`. None leaves all prompts in the
                cache, so that their keys need not be copied.
        """
        row_prompt, longest = self.row_prompt[rows], None
        rows = rows.to(self.prompt_lengths.device)
        for held in (self.response, self.continued):
            for layer, pair in held.items():
                held[layer] = _chosen(pair, rows)
        if prompts is not None:
            row_prompt = torch.searchsorted(prompts, row_prompt)
            prompts = prompts.to(self.prompt_lengths.device)
            self.prompt_lengths = self.prompt_lengths[prompts]
            longest = int(self.prompt_lengths.max())
            for layer, (keys, values) in self.prompt.items():
                self.prompt[layer] = _chosen((keys[:, :, :longest], values[:, :, :longest]), prompts)
            for layer, pair in self.states.items():
                self.states[layer] = _chosen(pair, prompts)
        if self.noise is not None:
            length = self.noise.cells_BP.shape[1] if longest is None else longest
            self.noise = self.noise.select(rows, prompts, length)
        self._arrange(row_prompt)

    def hide_last_prompt_token(self) -> None:
        """Hide the last key of every prompt, because its token is fed again as the first of each row."""
        self.prompt_lengths = self.prompt_lengths - 1
        self._hidden = self._padding_mask = None

    def noise_of(self, layer: int) -> Optional[VisualNoise]:
        """Return the noise on a layer's scores of the prompt. None: the layer has none."""
        if self.noise is None:
            return None
        place = self.noise.place_of(layer)
        if place is None:
            return None
        if place not in self._noise_on_keys:
            self._noise_on_keys[place] = self.noise.on_keys(self.by_prompt(self.noise.values_NLC[:, place]))
        return self._noise_on_keys[place]

    def by_prompt(self, rows: Tensor) -> Tensor:
        """Arrange values of rows by prompt: [N, ...] to [B, width, ...]. Places without a row are zero."""
        shape = (len(self.prompt_lengths), self.width, *rows.shape[1:])
        if self._places is None:
            return rows.view(shape)
        return rows.new_zeros(shape[0] * shape[1], *shape[2:]).index_copy_(0, self._places, rows).view(shape)

    def by_row(self, places: Tensor) -> Tensor:
        """Invert `by_prompt`: [B, width, ...] to [N, ...]."""
        places = places.flatten(0, 1)
        return places if self._places is None else places.index_select(0, self._places)

    def hidden_keys(self, P: int) -> Tensor:
        """Return [B, P] bool, True at the padding of a prompt."""
        if self._hidden is None:
            self._hidden = torch.arange(P, device=self.prompt_lengths.device) >= self.prompt_lengths[:, None]
        return self._hidden

    def padding_mask(self, dtype: torch.dtype) -> Optional[Tensor]:
        """Return [B, 1, 1, P], -inf at the padding of a prompt and 0 elsewhere. None: no prompt has padding. The host
        waits for the lengths at first."""
        if self._padding_mask is None:
            hidden = self.hidden_keys(next(iter(self.prompt.values()))[0].shape[2])
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            self._padding_mask = (mask[:, None, None] if bool(hidden.any()) else None,)
        return self._padding_mask[0]
