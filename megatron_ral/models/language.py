"""The language model of one pipeline stage: megatron-core's GPTModel with our core attention.

Departure from GPTModel: tied embeddings on the first and last stage are not made equal by a collective at build time.
Weights always come from a checkpoint, which gives both copies the same values; the engine keeps them equal by summing
their gradients.
"""

import copy

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ral.models.instrumented_attention import InstrumentedAttention
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.layout import ParallelLayout, stage_sizes


class LanguageStage(GPTModel):
    """GPTModel whose tied copies are only marked (`weight.shared`), not synchronised, when built."""

    def setup_embeddings_and_output_layer(self) -> None:
        if self.share_embeddings_and_output_weights and self.post_process and not self.pre_process:
            self.output_layer.weight.shared = True


def transformer_config(shape: ModelShape, layout: ParallelLayout, dtype: torch.dtype,
                       device: torch.device) -> TransformerConfig:
    """megatron-core configuration of a Qwen2.5 language model.

    `calculate_per_token_loss` keeps the schedule from dividing the loss by the number of micro-batches: here a loss
    is a sum over a global denominator already.
    """
    return TransformerConfig(
        num_layers=shape.num_layers, hidden_size=shape.hidden_size, ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads, num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels, mrope_section=list(shape.mrope_section),
        normalization="RMSNorm", layernorm_epsilon=shape.rms_norm_eps, gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=False, add_qkv_bias=True, hidden_dropout=0.0, attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_size, pipeline_model_parallel_size=layout.pipeline_size,
        params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16,
        use_cpu_initialization=device.type != "cuda", perform_initialization=False,
        gradient_accumulation_fusion=False, bias_activation_fusion=False, bias_dropout_fusion=False,
        masked_softmax_fusion=False, apply_rope_fusion=False, persist_layer_norm=False,
        pipeline_model_parallel_layout=_pipeline_layers(shape, layout),
        deallocate_pipeline_outputs=False, batch_p2p_comm=False, calculate_per_token_loss=True,
    )


def _pipeline_layers(shape: ModelShape, layout: ParallelLayout) -> list[list[str]] | None:
    """Our split of the layers in megatron-core's terms; None without a pipeline."""
    if layout.pipeline_size == 1:
        return None
    stages = [["decoder"] * size for size in stage_sizes(shape.num_layers, layout.pipeline_size)]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def build_language_stage(shape: ModelShape, layout: ParallelLayout, dtype: torch.dtype,
                         device: torch.device) -> LanguageStage:
    """This rank's stage, weights uninitialised (`weights.load_stage` fills them)."""
    spec = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm"))
    spec.submodules.self_attention.submodules.core_attention = ModuleSpec(module=InstrumentedAttention)
    return LanguageStage(
        config=transformer_config(shape, layout, dtype, device), transformer_layer_spec=spec,
        vocab_size=shape.padded_vocab_size(layout.tensor_size), max_sequence_length=shape.max_position_embeddings,
        pre_process=layout.is_first_stage, post_process=layout.is_last_stage, parallel_output=True,
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        position_embedding_type="mrope", rotary_base=shape.rope_theta,
    )
