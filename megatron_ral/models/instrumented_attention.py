"""Core attention for the group layout, with recording of queries and keys for RAL, and with the KV cache.

It replaces megatron-core's `DotProductAttention` through the layer spec. Departures from it:

- the output comes from fused calls for the prompt (causal) and for the responses (`attention/shared_prompt.py`);
- `attention_mask` is an `AttentionPass`, which has the layout, the layers to record and the cache;
- keys of grouped-query attention are not repeated in memory where the kernel can do without.

Fused kernels do not return softmax weights. Queries and keys of the response rows are therefore recorded, and
`attention/rows.py` forms the attention rows from them in float32.
"""

import math
from typing import Optional, cast

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ral.attention.exploration import VisualNoise, move_inside_picture
from megatron_ral.attention.group_layout import AttentionRecord, GroupLayout
from megatron_ral.attention.shared_prompt import GroupTensors, kernel_for, shared_prompt_attention
from megatron_ral.models.attention_pass import AttentionPass


class InstrumentedAttention(torch.nn.Module):
    """Core attention of one layer on one tensor-parallel rank.

    Inputs are those of megatron-core: query [L, B, n, D], key and value [L, B, k, D] after rotary embedding. The output
    is [L, B, n D]. In a pass over groups B is 1. The output is zero in rows behind the groups, which exist because
    sequence parallelism pads the length to a multiple of the tensor ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: Optional[float] = None,
        **unused,
    ):
        super().__init__()
        assert config.context_parallel_size == 1, (
            "attention distributions need whole rows: context parallelism must be 1"
        )
        assert config.attention_dropout == 0.0, "attention dropout would make p_theta differ from itself"
        self.layer = layer_number - 1
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(cast(int, config.kv_channels))
        self.num_heads = config.num_attention_heads
        """Number of heads of all tensor-parallel ranks."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: AttentionPass,
        attn_mask_type: Optional[AttnMaskType] = None,
        attention_bias: Optional[Tensor] = None,
        packed_seq_params=None,
    ) -> Tensor:
        assert attention_bias is None and packed_seq_params is None
        if attention_mask.layout.packed is not None:
            return self._groups(query[:, 0], key[:, 0], value[:, 0], attention_mask)[:, None].flatten(2)
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))  # [B, L, heads, D]
        if attention_mask.decode_step is not None:
            output = self._decode(query, key, value, attention_mask)
        else:
            assert attention_mask.cache is not None
            attention_mask.cache.store_prompt(self.layer, key, value)
            # Padding is on the right of a prompt, so that the causal mask alone hides it from real rows.
            output = self._sdpa(query, key, value, is_causal=True)
        return output.transpose(0, 1).flatten(2)

    def _groups(self, query: Tensor, key: Tensor, value: Tensor, pass_: AttentionPass) -> Tensor:
        """Return outputs [L, n, D] of queries [L, n, D], keys and values [L, k, D] of whole groups without padding."""
        layout, packed = pass_.layout, pass_.layout.packed
        assert packed is not None
        split = [packed.split(tensor) for tensor in (query, key, value)]
        prompt_query, prompt_key, prompt_value = (packed.prompts.pad(prompts) for prompts, _ in split)
        prompt_output = packed.prompts.pack(self._sdpa(prompt_query, prompt_key, prompt_value, is_causal=True))
        (_, own_query), *own = split
        own_key, own_value = (packed.responses.pad(responses) for _, responses in own)
        if self.layer in pass_.recorded_layers:
            last_prompt = prompt_query[torch.arange(layout.B, device=query.device), layout.prompt_lengths - 1]
            group_query = packed.responses.pad(own_query)
            pass_.records[self.layer] = AttentionRecord(group_query, last_prompt, prompt_key, own_key)
        group = GroupTensors(own_query, prompt_key, prompt_value, own_key, own_value)
        kernel = kernel_for(query, layout.P)
        if kernel is None:
            response_output = self._dense(group, layout)
        else:
            response_output = shared_prompt_attention(group, layout, self.softmax_scale, kernel)
        output, padding = torch.cat([prompt_output, response_output]), len(query) - packed.num_tokens
        return F.pad(output, (0, 0, 0, 0, 0, padding)) if padding else output

    def _dense(self, group: GroupTensors, layout: GroupLayout) -> Tensor:
        """Return `shared_prompt_attention` by one call with a dense mask, for inputs that no fused kernel takes."""
        G, packed = layout.G, layout.packed
        assert packed is not None
        query, prompt_key, prompt_value, own_key, own_value = group
        keys = torch.cat([prompt_key[:, None].expand(-1, G, -1, -1, -1), own_key], dim=2)
        values = torch.cat([prompt_value[:, None].expand(-1, G, -1, -1, -1), own_value], dim=2)
        mask = layout.visible_BGRS.flatten(0, 1)[:, None]
        rows = packed.responses.pad(query).flatten(0, 1)
        output = self._sdpa(rows, keys.flatten(0, 1), values.flatten(0, 1), attn_mask=mask)
        return packed.responses.pack(output.unflatten(0, packed.responses.shape[:2]))

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, **mask) -> Tensor:
        """Return attention outputs [B, L, heads, D] of queries [B, L, heads, D] and keys and values [B, S, kv, D]."""
        if "attn_mask" in mask and query.is_cuda and query.shape[2] != key.shape[2]:
            # Only the memory-efficient kernel accepts a mask, and it needs equal heads. The fallback would hold the
            # whole score matrix.
            repeats = query.shape[2] // key.shape[2]
            key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
        output = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
            **mask,
        )
        return output.transpose(1, 2)

    def decode(self, query_NkmD: Tensor, key_NkD: Tensor, value_NkD: Tensor, pass_: AttentionPass) -> Tensor:
        """Return outputs [N, k m D] for one token of each row of the cache, by fused calls on the CPU.

        The step is known to the host there, so that no call meets keys behind it.

        Args:
            query_NkmD: Queries after rotary embedding, not scaled.
            key_NkD: Keys after rotary embedding.
            value_NkD: Values.
            pass_: Pass with the cache and the decoding step.
        """
        cache = pass_.cache
        assert cache is not None and pass_.decode_step is not None
        if self.layer in pass_.recorded_layers or cache.noise_of(self.layer) is not None:
            query = query_NkmD.flatten(1, 2)[:, None]
            return self._decode(query, key_NkD[:, None], value_NkD[:, None], pass_).flatten(1)
        attend, length = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, int(pass_.decode_step) + 1
        keys, values, _ = cache.append(self.layer, pass_.decode_step, key_NkD, value_NkD)
        own, own_lse = attend(query_NkmD, keys[:, :, :length], values[:, :, :length], scale=self.softmax_scale)
        grouped = cache.by_prompt(query_NkmD)  # [B, width, k, m, D]
        mask = cache.padding_mask(query_NkmD.dtype)
        rows = grouped.transpose(1, 2).flatten(2, 3)
        output, lse = attend(rows, *cache.prompt[self.layer], attn_mask=mask, scale=self.softmax_scale)
        places = grouped.shape[1:4:2]
        output, lse = (cache.by_row(part.unflatten(2, places).transpose(1, 2)) for part in (output, lse))
        share = torch.sigmoid(own_lse - lse)[..., None]
        return torch.lerp(output.to(share.dtype), own.to(share.dtype), share).to(value_NkD.dtype).flatten(1)

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, pass_: AttentionPass) -> Tensor:
        """Return outputs [N, 1, heads D] for one token of each row of the cache.

        Attention over the shared prompt and over the row's own tokens is computed separately, then joined by their
        shares of the softmax. A prompt's keys are therefore neither copied nor read for each of its responses.
        """
        cache = pass_.cache
        assert cache is not None and pass_.decode_step is not None
        own_key, own_value, later = cache.append(self.layer, pass_.decode_step, key[:, 0], value[:, 0])
        prompt_key, prompt_value = cache.prompt[self.layer]
        k = prompt_key.shape[1]
        query = query[:, 0].unflatten(1, (k, -1)) * self.softmax_scale  # [N, k, heads / k, D]
        own = _attend(query, own_key, own_value, later)
        grouped = cache.by_prompt(query)  # [B, width, k, heads / k, D]
        prompt = _attend(
            grouped.transpose(1, 2).flatten(2, 3),
            prompt_key,
            prompt_value,
            cache.hidden_keys(prompt_key.shape[2])[:, None, None],
            cache.noise_of(self.layer),
        )
        *prompt, prompt_weights = prompt
        prompt = tuple(cache.by_row(part.unflatten(2, grouped.shape[1:4:2]).transpose(1, 2)) for part in prompt)
        maximum = torch.maximum(own[1], prompt[1])
        parts = [(output, total, (top - maximum).exp()) for output, top, total in (own[:3], prompt)]
        total = cast(Tensor, sum(total * share for _, total, share in parts))
        output = cast(Tensor, sum(output * share for output, _, share in parts)) / total
        if self.layer in pass_.recorded_layers:
            own_share, prompt_share = (share / (total * self.num_heads) for _, _, share in parts)  # [N, k, m, 1]
            over_own = (own[3] * own_share).sum(dim=(1, 2))
            weights = prompt_weights.unflatten(2, grouped.shape[1:4:2])  # [B, k, width, m, P]
            over_prompt = torch.einsum("bkwmp,bwkm->bwp", weights, cache.by_prompt(prompt_share[..., 0]))
            pass_.decoded_rows[self.layer] = cache.by_row(over_prompt), over_own
        return output.to(value.dtype).flatten(1, 2)[:, None]


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    """Return a batched product in float32, also of 16-bit factors.

    The sum of a product is float32 on a GPU, and must not be rounded to 16 bits on the way: at scores of 32 to 64 a
    step of bfloat16 is a quarter.
    """
    if not left.is_cuda or left.dtype == torch.float32:
        return torch.matmul(left, right).float()
    shape = *left.shape[:2], left.shape[2], right.shape[3]
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out_dtype=torch.float32).view(shape)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, hidden: Optional[Tensor] = None, noise: Optional[VisualNoise] = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return attention before the division by the sum of the softmax.

    Args:
        query: [X, k, L, D], already scaled.
        key: [X, k, S, D].
        value: [X, k, S, D].
        hidden: Bool that broadcasts to [X, k, L, S], True at keys that are not seen; None if all are seen.
        noise: Noise of X prompts with W rows each, L = W m. None: there is none.

    Returns:
        (sum of weight value [X, k, L, D], maximum [X, k, L, 1], sum of weights [X, k, L, 1], weights [X, k, L, S]),
        float32, where a weight is exp(score - maximum), moved inside the picture by the noise.
    """
    scores = _float32_product(query, key.transpose(2, 3))
    if hidden is not None:
        scores.masked_fill_(hidden, float("-inf"))
    maximum = scores.amax(dim=-1, keepdim=True)
    scores = scores.sub_(maximum)
    if noise is None:
        weights = scores.exp_()
    else:
        weights = move_inside_picture(scores.unflatten(2, (noise.noise_BWP.shape[1], -1)), noise).flatten(2, 3)
    return torch.matmul(weights.to(value.dtype), value).float(), maximum, weights.sum(dim=-1, keepdim=True), weights
