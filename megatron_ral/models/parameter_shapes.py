"""Names and shapes of all weights of a model, from its shape alone: no weights are read and no memory is used."""

import torch

from megatron_ral.models.families import build_tower
from megatron_ral.models.shape import ModelShape


def visual_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of the vision tower, by its name inside the tower."""
    with torch.device("meta"):
        tower = build_tower(shape.vision)
    return {name: tuple(parameter.shape) for name, parameter in tower.named_parameters()}


def expected_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint, by common name (see `weights.huggingface.common_name`)."""
    H, D = shape.hidden_size, shape.kv_channels
    query, key = shape.num_attention_heads * D, shape.num_query_groups * D
    result = {f"visual.{name}": size for name, size in visual_shapes(shape).items()}
    result["model.embed_tokens.weight"] = (shape.vocab_size, H)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        for part, rows in (("q", query), ("k", key), ("v", key)):
            result[f"{prefix}.self_attn.{part}_proj.weight"] = (rows, H)
            if shape.family.qkv_bias:
                result[f"{prefix}.self_attn.{part}_proj.bias"] = (rows,)
            if shape.family.qk_norm and part != "v":
                result[f"{prefix}.self_attn.{part}_norm.weight"] = (D,)
        result[f"{prefix}.self_attn.o_proj.weight"] = (H, query)
        for part in ("gate", "up"):
            result[f"{prefix}.mlp.{part}_proj.weight"] = (shape.ffn_hidden_size, H)
        result[f"{prefix}.mlp.down_proj.weight"] = (H, shape.ffn_hidden_size)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            result[f"{prefix}.{norm}.weight"] = (H,)
    result["model.norm.weight"] = (H,)
    if not shape.tie_word_embeddings:
        result["lm_head.weight"] = (shape.vocab_size, H)
    return result
