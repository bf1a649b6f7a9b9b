"""Language model of one pipeline stage: megatron-core's GPTModel with our core attention, norms and layers.

Departures from GPTModel:

- tied embeddings on the first and last stage are not made equal by a collective when the model is built. Both copies
  get the same values from a checkpoint, and the engine preserves that by summing their gradients;
- norms are torch's RMSNorm under sequence parallelism too. `partial_over_tensor_ranks` marks those whose gradient is
  only a part of a sum over tensor ranks, which the engine then forms;
- matrices of the layers may have low-rank adapters (`adapted_linear.py`);
- a layer adds features of the vision tower to its output if the `AttentionPass` has some for it (DeepStack);
- the activation keeps its input alone for the backward pass (`swiglu.py`);
- the last layer's MLP is computed for the rows alone that the LM head reads, except under sequence parallelism.
"""

import copy
from typing import Any, Optional, Protocol, cast

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ral.compat.megatron_output_gate import GatedSelfAttention
from megatron_ral.models.adapted_linear import AdaptedColumnParallelLinear, AdaptedRowParallelLinear, add_adapters
from megatron_ral.models.attention_pass import AttentionPass
from megatron_ral.models.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron_ral.models.instrumented_attention import InstrumentedAttention
from megatron_ral.models.norms import RMSNorm
from megatron_ral.models.shape import ModelShape
from megatron_ral.models.swiglu import SwiGlu
from megatron_ral.parallel.rank_layout import RankLayout, stage_sizes


class LayerParameters(Protocol):
    """Gathering of a layer's parameters around its forward pass (see `engine.gather`)."""

    def enter(self, hidden: Tensor) -> Tensor:
        """Make the parameters available. Return the input that the layer has to read instead of `hidden`."""
        ...

    def leave(self) -> None:
        """End the use of the parameters by this forward pass."""


class StageLayer(TransformerLayer):
    """Transformer layer with activation recomputation, gathering of its parameters, and DeepStack features.

    The features in `AttentionPass.deepstack` for this layer are added to its output. Of a prompt the last layer returns
    only the last row (`returns_read_rows`), because nothing reads the others: their MLP would be work for nothing.
    """

    recompute: bool = False
    """True to save only the layer's input for the backward pass, unless its attention is recorded."""
    weights: Optional[LayerParameters] = None
    """Gathering of the parameters around each forward pass; None where they stay available."""

    _pass: Optional[AttentionPass] = None
    """Pass under way, where the MLP reads some of its rows alone."""

    def returns_read_rows(self, pass_: AttentionPass) -> bool:
        """Return whether the output has the rows `AttentionPass.read_rows` alone.

        Under sequence parallelism it has all, because each tensor rank holds a part of them.
        """
        is_last = self.layer_number == self.config.num_layers
        return is_last and not self.config.sequence_parallel and self.layer_number - 1 not in pass_.deepstack

    def _forward_mlp(self, hidden_states, *args, **kwargs):
        if self._pass is not None:
            hidden_states = self._pass.read_rows(hidden_states)
        return super()._forward_mlp(hidden_states, *args, **kwargs)

    def forward(self, hidden_states, *args, attention_mask, **kwargs):
        def layer(hidden):
            self._pass = attention_mask if self.returns_read_rows(attention_mask) else None
            if self.weights is not None:
                hidden = self.weights.enter(hidden)
            result = super(StageLayer, self).forward(hidden, *args, attention_mask=attention_mask, **kwargs)
            if self.weights is not None:
                self.weights.leave()
            self._pass = None
            return result

        recorded = self.layer_number - 1 in attention_mask.recorded_layers
        if self.recompute and torch.is_grad_enabled() and not recorded:
            # Nothing in a layer is random, so that no random state has to be saved.
            hidden, context = checkpoint(layer, hidden_states, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden, context = layer(hidden_states)
        features = attention_mask.deepstack.get(self.layer_number - 1)
        return (hidden if features is None else features.add_to(hidden)), context


class LanguageStage(GPTModel):
    """GPTModel that marks the last stage's copy of tied embeddings (`weight.shared`) instead of synchronising it."""

    def setup_embeddings_and_output_layer(self) -> None:
        if self.share_embeddings_and_output_weights and self.post_process and not self.pre_process:
            cast(Any, self.output_layer).weight.shared = True

    def embed_words(self, token_ids: Tensor) -> Tensor:
        """Return embeddings [S, B, H] of tokens [B, S], the whole sequence on every tensor rank.

        megatron-core's own module would wait for the device twice, to find the tokens of other ranks.
        """
        words = cast(Any, self.embedding.word_embeddings)
        outside = (token_ids < words.vocab_start_index) | (token_ids >= words.vocab_end_index)
        rows = F.embedding((token_ids - words.vocab_start_index).masked_fill(outside, 0), words.weight)
        if self.config.tensor_model_parallel_size > 1:
            rows = reduce_from_tensor_model_parallel_region(rows.masked_fill(outside[..., None], 0.0))
        return rows.transpose(0, 1).contiguous()


def transformer_config(
    shape: ModelShape, layout: RankLayout, dtype: torch.dtype, device: torch.device, sequence_parallel: bool = False
) -> TransformerConfig:
    """Return megatron-core's configuration of a language model.

    `calculate_per_token_loss` stops the schedule from dividing the loss by the number of micro-batches, because losses
    already are sums over a global denominator.

    Args:
        shape: Shape of the model.
        layout: This rank's place.
        dtype: Type of parameters and activations.
        device: Device on which the model is built.
        sequence_parallel: True to cut the sequence over tensor ranks outside attention.
    """
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        mrope_section=list(shape.mrope_section),
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.family.qkv_bias,
        qk_layernorm=shape.family.qk_norm,
        attention_output_gate=shape.family.output_gate,
        layernorm_zero_centered_gamma=shape.family.zero_centred_norms,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        sequence_parallel=sequence_parallel,
        tensor_model_parallel_size=layout.tensor_size,
        pipeline_model_parallel_size=layout.pipeline_size,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=device.type != "cuda",
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        use_te_activation_func=True,  # the activation of the layer spec, which need not be Transformer Engine's
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        pipeline_model_parallel_layout=_pipeline_layers(shape, layout),
        deallocate_pipeline_outputs=False,
        batch_p2p_comm=False,
        calculate_per_token_loss=True,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # unused, but the default refuses variable lengths
    )


def _pipeline_layers(shape: ModelShape, layout: RankLayout) -> list[list[str]] | None:
    """Return the split of the layers over stages in megatron-core's terms, or None without a pipeline."""
    if layout.pipeline_size == 1:
        return None
    stages = [["decoder"] * size for size in stage_sizes(shape.num_layers, layout.pipeline_size)]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def _stage_spec(shape: ModelShape, layout: RankLayout) -> TransformerBlockSubmodules:
    """Return the layer specs of this stage, with our modules in place of megatron-core's."""
    local = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape.family.qk_norm)
    spec = cast(Any, copy.deepcopy(local))
    spec.module = StageLayer
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    layer.mlp.submodules.activation_func = SwiGlu
    matrices = attention.linear_qkv, attention.linear_proj
    if shape.adapter is not None:
        attention.linear_qkv = layer.mlp.submodules.linear_fc1 = AdaptedColumnParallelLinear
        attention.linear_proj = layer.mlp.submodules.linear_fc2 = AdaptedRowParallelLinear
    attention.core_attention = ModuleSpec(module=InstrumentedAttention)
    if shape.family.qk_norm:
        attention.q_layernorm = attention.k_layernorm = ModuleSpec(module=RMSNorm, params={"over_heads": True})
    if shape.family.output_gate:
        layer.self_attention.module = GatedSelfAttention
    specs = {True: spec}
    if shape.linear_attention is not None:
        specs[False] = copy.deepcopy(spec)
        specs[False].submodules.self_attention = ModuleSpec(
            module=GatedDeltaNet,
            params={"shape": shape.linear_attention},
            submodules=GatedDeltaNetSubmodules(*matrices),
        )
    layers = layout.stage_layers(shape.num_layers)
    return TransformerBlockSubmodules(
        [specs[index in shape.softmax_layers] for index in layers], layer_norm=cast(Any, RMSNorm)
    )


def build_language_stage(
    shape: ModelShape, layout: RankLayout, dtype: torch.dtype, device: torch.device, sequence_parallel: bool = False
) -> LanguageStage:
    """Return this rank's stage with uninitialised weights, which `weights.stage_weights.load_stage` fills.

    Arguments are those of `transformer_config`.
    """
    stage = LanguageStage(
        config=transformer_config(shape, layout, dtype, device, sequence_parallel),
        transformer_layer_spec=cast(Any, _stage_spec(shape, layout)),  # megatron takes submodules of a block too
        vocab_size=shape.padded_vocab_size(layout.tensor_size),
        max_sequence_length=shape.max_position_embeddings,
        pre_process=layout.is_first_stage,
        post_process=layout.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        scatter_embedding_sequence_parallel=False,
        position_embedding_type="mrope",
        rotary_percent=shape.rotary_width / shape.kv_channels,
        rotary_base=cast(Any, shape.rope_theta),  # megatron only divides by its powers
    )
    if shape.adapter is not None:
        for layer in stage.decoder.layers:
            add_adapters(layer, shape, layout, dtype, device)
    if sequence_parallel:
        # The block would fork a random number generator per tensor rank for dropout, which is always 0 here.
        stage.decoder.config = copy.copy(stage.decoder.config)
        stage.decoder.config.sequence_parallel = False
        if layout.is_last_stage:
            stage.output_layer.sequence_parallel = False  # its input is gathered before rows are chosen
    return stage
