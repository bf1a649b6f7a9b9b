"""Sizes and weights of linear attention layers (gated delta nets). The module is in `gated_delta_net.py`.

transformers keeps queries, keys and values, the output gate, and the two gates of the rule in four matrices. Here one
matrix has a block of rows for each key head: its queries, its keys, and values, output gate, step and decay of its
value heads. A cut of the rows over tensor ranks therefore is a cut over heads, as for `linear_qkv`.
"""

from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearAttentionShape:
    """Sizes of the linear attention layers of a model."""

    layers: tuple[int, ...]
    """0-based layers that have linear attention. The others have softmax attention."""
    num_key_heads: int
    """Number of heads of queries and keys."""
    num_value_heads: int
    """Number of heads of values and states, a multiple of the key heads."""
    key_head_dim: int
    """Width of a query and of a key."""
    value_head_dim: int
    """Width of a value."""
    conv_kernel: int
    """Tokens that the causal convolution of queries, keys and values reads."""

    @property
    def values_per_key(self) -> int:
        """Number of value heads of one key head."""
        return self.num_value_heads // self.num_key_heads

    @property
    def key_width(self) -> int:
        """Width of all queries, and of all keys."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_width(self) -> int:
        """Width of all values."""
        return self.num_value_heads * self.value_head_dim

    @property
    def conv_width(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_width + self.value_width

    @property
    def block(self) -> tuple[int, ...]:
        """Rows of the fused matrix per key head: query, key, values, output gates, steps, decays."""
        values = self.values_per_key * self.value_head_dim
        return self.key_head_dim, self.key_head_dim, values, values, self.values_per_key, self.values_per_key

    def weight_shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight of a layer, by its name inside `linear_attn` in transformers.

        Args:
            hidden_size: Width of the hidden states.
        """
        return {
            "in_proj_qkv.weight": (self.conv_width, hidden_size),
            "in_proj_z.weight": (self.value_width, hidden_size),
            "in_proj_b.weight": (self.num_value_heads, hidden_size),
            "in_proj_a.weight": (self.num_value_heads, hidden_size),
            "conv1d.weight": (self.conv_width, 1, self.conv_kernel),
            "dt_bias": (self.num_value_heads,),
            "A_log": (self.num_value_heads,),
            "norm.weight": (self.value_head_dim,),
            "out_proj.weight": (hidden_size, self.value_width),
        }

    def merge_conv(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return rows of all queries, keys and values as rows of each key head in turn."""
        (full,) = tensors
        return self._by_head(full.split([self.key_width, self.key_width, self.value_width]))

    def split_conv(self, full: Tensor) -> list[Tensor]:
        """Invert `merge_conv`."""
        return [torch.cat(self._by_part(full, self.block[:3]))]

    def merge_inputs(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the fused matrix, given those of queries, keys and values, of output gate, step and decay."""
        mixed, *rest = tensors
        return self._by_head([*mixed.split([self.key_width, self.key_width, self.value_width]), *rest])

    def split_inputs(self, full: Tensor) -> list[Tensor]:
        """Invert `merge_inputs`."""
        parts = self._by_part(full, self.block)
        return [torch.cat(parts[:3]), *parts[3:]]

    def _by_head(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.unflatten(0, (self.num_key_heads, -1)) for part in parts], dim=1).flatten(0, 1)

    def _by_part(self, full: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        return [part.flatten(0, 1) for part in full.unflatten(0, (self.num_key_heads, -1)).split(list(sizes), dim=1)]
