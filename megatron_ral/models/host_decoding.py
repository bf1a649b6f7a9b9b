"""Decoding step of a stage on the CPU: the parameters and the arithmetic of the stage's modules in fewer operations.

A step over one token of each row is short enough for what surrounds it to count. It departs from the modules in this:

- matrices are held transposed, so that the product of a few rows with them reads memory in its order. This is a second
  copy of the stage's language weights, held as long as this object;
- a layer is about thirty calls of torch without modules around them, and residuals are added in place;
- attention is two calls of torch's flash attention, as in the training pass (`attention/shared_prompt.py`).

Results are those of the modules up to the order of sums. On a GPU the modules run, as a recorded pass
(`engine/decode_graph.py`).
"""

from typing import Any, Callable, Optional, cast

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_ral.compat.megatron_output_gate import GatedSelfAttention
from megatron_ral.models.attention_pass import AttentionPass
from megatron_ral.models.gated_delta_net import GatedDeltaNet
from megatron_ral.models.instrumented_attention import InstrumentedAttention
from megatron_ral.models.language import StageLayer
from megatron_ral.models.multimodal import MultimodalStage
from megatron_ral.models.norms import RMSNorm

Function = Callable[[Tensor], Tensor]


class HostDecoding:
    """Decoding step of one stage whose parameters are whole, and stay whole and unchanged while this object is used.

    Args:
        stage: Stage on the CPU of which `fits` is true.
    """

    def __init__(self, stage: MultimodalStage):
        self.stage = stage
        self._layers = [_Layer(layer, stage) for layer in stage.layers]
        self._norm: Optional[Function] = None
        self._head: Optional[Tensor] = None
        if stage.layout.is_last_stage:
            self._norm = _norm(cast(Any, stage.language.decoder).final_layernorm)
            self._head = stage.head_weight().detach().t().contiguous()

    @staticmethod
    def fits(stage: MultimodalStage) -> bool:
        """Say whether a stage is on the CPU and all of its layers are of the plain kind."""
        on_host = all(parameter.device.type == "cpu" for parameter in stage.parameters())
        return on_host and all(_is_plain(layer, stage) for layer in stage.layers)

    def __call__(self, token_N: Tensor, positions_N: Tensor, attention: AttentionPass) -> Tensor:
        """Run the stage as `MultimodalStage.decode` does, with its arguments and its result, without gradient."""
        stage = self.stage
        if stage.layout.is_first_stage:
            hidden = stage.language.embed_words(token_N[:, None])[0]
        else:  # changed in place from here on, and what was received belongs to the batch
            hidden = cast(Tensor, stage.language.decoder.input_tensor)[0].clone()
        rotation = stage.rotation(positions_N[None, :, None].expand(3, -1, -1))[:, 0]  # [2, N, 1, D]
        cosine, sine = rotation
        half = sine.shape[-1] // 2
        signed = torch.cat([-sine[..., :half], sine[..., half:]], dim=-1)
        for layer in self._layers:
            hidden = layer(hidden, cosine, signed, attention)
        if self._head is None or self._norm is None:
            return hidden[None]
        return stage.without_padding(self._norm(hidden) @ self._head)


class _Layer:
    """Decoding step of one layer."""

    def __init__(self, layer: StageLayer, stage: MultimodalStage):
        attention, mlp, shape = cast(Any, layer.self_attention), cast(Any, layer.mlp), stage.shape
        self.width = shape.kv_channels
        self.groups = shape.num_query_groups // stage.layout.tensor_size
        """Key and value heads of this tensor rank."""
        self.input_norm, self.mlp_norm = _norm(layer.input_layernorm), _norm(layer.pre_mlp_layernorm)
        self.query_norm = self.key_norm = None
        if shape.family.qk_norm:
            self.query_norm, self.key_norm = _norm(attention.q_layernorm), _norm(attention.k_layernorm)
        self.core = cast(InstrumentedAttention, attention.core_attention)
        self.qkv, self.fc1 = _column(attention.linear_qkv), _column(mlp.linear_fc1)
        self.add_proj, self.add_fc2 = _row(attention.linear_proj, stage), _row(mlp.linear_fc2, stage)

    def __call__(self, hidden_NH: Tensor, cosine: Tensor, signed: Tensor, attention: AttentionPass) -> Tensor:
        """Return the layer's output [N, H], written over its input where that saves a copy.

        Args:
            hidden_NH: [N, H].
            cosine: Cosines of the rotary angles, [N, 1, width that is rotated].
            signed: Their sines, the first half negated.
            attention: Pass.
        """
        fused = self.qkv(self.input_norm(hidden_NH)).unflatten(1, (self.groups, -1, self.width))
        rotated, value = fused[:, :, :-1], fused[:, :, -1]  # [N, k, m + 1, D], [N, k, D]
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(rotated[:, :, :-1]), self.key_norm(rotated[:, :, -1:])
            rotated = torch.cat([query, key], dim=2)
        rotated = _rotate(rotated, cosine[:, None], signed[:, None])
        output = self.core.decode(rotated[:, :, :-1], rotated[:, :, -1], value, attention)
        hidden = self.add_proj(hidden_NH, output)
        gate, up = self.fc1(self.mlp_norm(hidden)).chunk(2, dim=-1)
        return self.add_fc2(hidden, F.silu(gate).mul_(up))


def _is_plain(layer: StageLayer, stage: MultimodalStage) -> bool:
    attention = layer.self_attention
    if isinstance(attention, (GatedDeltaNet, GatedSelfAttention)) or not isinstance(attention, SelfAttention):
        return False
    return stage.shape.num_query_groups % stage.layout.tensor_size == 0


def _rotate(vectors: Tensor, cosine: Tensor, signed: Tensor) -> Tensor:
    """Return vectors [N, k, heads, D] of which the first channels, as many as `cosine` has, are rotated."""
    width = cosine.shape[-1]
    if width < vectors.shape[-1]:
        rest = vectors[..., width:]
        return torch.cat([_rotate(vectors[..., :width], cosine, signed), rest], dim=-1)
    return torch.addcmul(vectors * cosine, vectors.roll(width // 2, dims=-1), signed)


def _norm(norm: Any) -> Function:
    """Return a norm without the module around it."""
    assert isinstance(norm, RMSNorm)
    if norm.is_zero_centred:
        return norm.forward
    weight, shape, eps = norm.weight.detach(), list(norm.normalized_shape), norm.eps
    return lambda x: F.rms_norm(x, shape, weight, eps)


def _has_adapter(linear: Any) -> bool:
    return getattr(linear, "adapter", None) is not None


def _column(linear: Any) -> Function:
    """Return x [N, inputs] -> outputs of this rank [N, outputs] of a column-parallel matrix."""
    if _has_adapter(linear):
        return lambda x: linear(x[:, None])[0][:, 0]
    matrix, bias = linear.weight.detach().t().contiguous(), linear.bias
    if bias is None:
        return lambda x: x @ matrix
    bias = bias.detach()
    return lambda x: torch.addmm(bias, x, matrix)


def _row(linear: Any, stage: MultimodalStage) -> Callable[[Tensor, Tensor], Tensor]:
    """Return (hidden, x [N, inputs of this rank]) -> hidden + the whole output [N, H] of a row-parallel matrix."""
    if _has_adapter(linear):
        return lambda hidden, x: hidden + linear(x[:, None])[0][:, 0]
    matrix = linear.weight.detach().t().contiguous()
    if stage.layout.tensor_size == 1:
        return lambda hidden, x: hidden.addmm_(x, matrix)
    return lambda hidden, x: hidden.add_(reduce_from_tensor_model_parallel_region(x @ matrix))
