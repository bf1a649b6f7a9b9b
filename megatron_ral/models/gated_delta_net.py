"""Linear attention of one layer in the group layout: gated delta rule behind a short causal convolution.

It stands in the place of softmax attention in three of four layers of Qwen3.5. The state of a layer is a matrix per
value head and the last inputs of the convolution. In the group layout each response starts from the state that its
prompt leaves, which is exact: nothing of one response reaches another. While decoding every row has a state of its own,
a copy of its prompt's.

megatron-core's own module (`megatron.core.ssm.gated_delta_net`, 0.16.1) needs CUDA, neither takes nor returns a state,
and has no decoding. The parameters have its names, but one matrix interleaves the heads (`linear_attention.py`).
"""

from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ral.functional.delta_rule import delta_step_, gated_delta_rule
from megatron_ral.models.attention_pass import AttentionPass
from megatron_ral.models.linear_attention import LinearAttentionShape
from megatron_ral.models.norms import RMSNorm

SLICE = 65_536
"""Prompt tokens that a pass without gradient gives to the rule at a time, at least one prompt."""


@dataclass
class GatedDeltaNetSubmodules:
    """Classes of the two matrices, as megatron-core's specs have them."""

    in_proj: Any
    """Class of the column-parallel matrix."""
    out_proj: Any
    """Class of the row-parallel matrix."""


class GatedDeltaNet(torch.nn.Module):
    """Linear attention of one layer on one tensor-parallel rank, with megatron-core's signature of self-attention.

    Args:
        config: Configuration of the model.
        submodules: Classes of the matrices.
        layer_number: 1-based number of the layer.
        shape: Sizes of the layer over all tensor ranks.
        pg_collection: Process groups of megatron-core.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int,
        shape: LinearAttentionShape,
        pg_collection: Optional[ProcessGroupCollection] = None,
        **unused,
    ):
        super().__init__()
        assert pg_collection is not None
        self.layer, self.shape = layer_number - 1, shape
        ranks = pg_collection.tp.size()
        self.num_heads = shape.num_key_heads // ranks
        """Number of key heads of this rank."""
        shared: dict[str, Any] = {
            "config": config,
            "bias": False,
            "is_expert": False,
            "tp_group": pg_collection.tp,
        }
        self.in_proj = submodules.in_proj(
            config.hidden_size,
            shape.num_key_heads * sum(shape.block),
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            **shared,
        )
        self.out_proj = submodules.out_proj(
            shape.value_width,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **shared,
        )
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        place: dict[str, Any] = {"device": device, "dtype": config.params_dtype}
        channels, values = shape.conv_width // ranks, shape.num_value_heads // ranks
        self.conv1d = torch.nn.Conv1d(channels, channels, shape.conv_kernel, groups=channels, bias=False, **place)
        self.dt_bias = torch.nn.Parameter(torch.empty(values, **place))
        self.A_log = torch.nn.Parameter(torch.empty(values, **place))
        self.out_norm = RMSNorm(
            config, shape.value_head_dim, config.layernorm_epsilon, over_heads=True, centred_at_one=True
        )

    def forward(self, hidden_states: Tensor, attention_mask: AttentionPass, **unused: Any) -> tuple[Tensor, None]:
        """Return outputs [S, B, H], of which each rank has its part of S under sequence parallelism, and no bias.

        They are zero in rows beyond the group layout.

        Args:
            hidden_states: [S, B, H] inputs.
            attention_mask: Pass, with the layout of the groups and the cache.
        """
        pass_ = attention_mask
        fused = self.in_proj(hidden_states)[0].transpose(0, 1)  # [B, L, ...]
        per_head = fused.unflatten(-1, (self.num_heads, -1))
        mixed, *rest = per_head.split([sum(self.shape.block[:3]), *self.shape.block[3:]], dim=-1)
        mixed = mixed.flatten(-2)
        gate = rest[0].unflatten(-1, (self.shape.values_per_key, -1)).flatten(-3, -2)  # [B, L, h, Dv]
        step = rest[1].flatten(-2).float().sigmoid()
        decay = -self.A_log.float().exp() * F.softplus(rest[2].flatten(-2).float() + self.dt_bias.float())
        if pass_.decode_step is not None:
            output = self._decode(mixed[:, 0], decay[:, 0], step[:, 0], pass_)[:, None]
        else:
            output = self._whole(mixed, decay, step, pass_)
        gated = self.out_norm(output.to(fused.dtype)) * F.silu(gate.float())
        return self.out_proj(gated.to(fused.dtype).flatten(-2).transpose(0, 1).contiguous())

    def _whole(self, mixed: Tensor, decay: Tensor, step: Tensor, pass_: AttentionPass) -> Tensor:
        """Return outputs [B, L, h, Dv] of whole groups (B = 1, without padding), or of prompts alone.

        Args:
            mixed: Inputs of the convolution, [B, L, channels].
            decay: [B, L, h] float32.
            step: [B, L, h] float32.
            pass_: Pass with the layout.
        """
        packed, parts = pass_.layout.packed, (mixed, decay, step)
        if packed is not None:
            split = [packed.split(part[0]) for part in parts]
            mixed, decay, step = (packed.prompts.pad(prompts) for prompts, _ in split)
        B, P, _ = mixed.shape
        lengths = pass_.layout.prompt_lengths if pass_.cache is None else pass_.cache.state_lengths
        # Padding behind a prompt must neither change its state nor make it forget.
        is_real = (torch.arange(P, device=mixed.device) < lengths[:, None])[..., None]
        padded = F.pad(mixed, (0, 0, self.shape.conv_kernel - 1, 0))
        query, key, value = self._parts(padded)
        decays, steps = decay * is_real, step * is_real
        # The rule holds several times its inputs, which a pass without gradient need not do for all prompts at once.
        size = B if torch.is_grad_enabled() else max(SLICE // P, 1)
        slices = zip(*(part.split(size) for part in (query, key, value, decays, steps)))
        sliced = [gated_delta_rule(*part) for part in slices]
        output, state = sliced[0] if len(sliced) == 1 else (torch.cat(part) for part in zip(*sliced))
        # `padded` begins with as many zeros as the tail is long, so that the tail begins at the prompt's length.
        tail = lengths[:, None] + torch.arange(self.shape.conv_kernel - 1, device=mixed.device)
        tail = padded.gather(1, tail[..., None].expand(-1, -1, padded.shape[-1]))
        if pass_.cache is not None:
            pass_.cache.store_state(self.layer, tail, state)
        if packed is None:
            return output
        G = pass_.layout.G
        mixed, decay, step = (packed.responses.pad(responses) for _, responses in split)
        continued = torch.cat([tail[:, None].expand(-1, G, -1, -1), mixed], dim=2).flatten(0, 1)
        own, _ = gated_delta_rule(
            *self._parts(continued),
            decay.flatten(0, 1),
            step.flatten(0, 1),
            state[:, None].expand(-1, G, -1, -1, -1).flatten(0, 1),
        )
        joined = torch.cat([packed.prompts.pack(output), packed.responses.pack(own.unflatten(0, (B, G)))])
        padding = parts[0].shape[1] - packed.num_tokens
        return (F.pad(joined, (0, 0, 0, 0, 0, padding)) if padding else joined)[None]

    def _decode(self, mixed_NC: Tensor, decay_Nh: Tensor, step_Nh: Tensor, pass_: AttentionPass) -> Tensor:
        """Return outputs [N, h, Dv] of one token of each row, and change the rows' states."""
        assert pass_.cache is not None
        tail, state = pass_.cache.row_states(self.layer)
        window = torch.cat([tail, mixed_NC[:, None]], dim=1)
        tail.copy_(window[:, 1:])
        query, key, value = (part[:, 0] for part in self._parts(window))
        return delta_step_(query, key, value, decay_Nh, step_Nh, state)

    def _parts(self, mixed_BLC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key [B, l, k, Dk] and value [B, l, h, Dv] after the convolution, l = L + 1 - its kernel."""
        mixed = F.silu(self.conv1d(mixed_BLC.transpose(1, 2))).transpose(1, 2)
        query, key, value = mixed.unflatten(-1, (self.num_heads, -1)).split(list(self.shape.block[:3]), dim=-1)
        return query, key, value.unflatten(-1, (self.shape.values_per_key, -1)).flatten(-3, -2)
