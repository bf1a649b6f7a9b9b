"""Names and shapes of all weights of a model, from its shape alone: no weights are read and no memory is used."""

import torch

from megatron_ral.models.adapters import adapter_weight
from megatron_ral.models.families import build_tower
from megatron_ral.models.shape import ModelShape


def visual_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of the vision tower, by its name inside the tower."""
    with torch.device("meta"):
        tower = build_tower(shape.vision)
    return {name: tuple(parameter.shape) for name, parameter in tower.named_parameters()}


def matrix_shape(shape: ModelShape, name: str) -> tuple[int, int]:
    """Return the shape [outputs, inputs] of a matrix of a language layer, by common name."""
    H, query, key = (
        shape.hidden_size,
        *(heads * shape.kv_channels for heads in (shape.num_attention_heads, shape.num_query_groups)),
    )
    sizes = {
        "q_proj": (query * (2 if shape.family.output_gate else 1), H),
        "k_proj": (key, H),
        "v_proj": (key, H),
        "o_proj": (H, query),
        "gate_proj": (shape.ffn_hidden_size, H),
        "up_proj": (shape.ffn_hidden_size, H),
        "down_proj": (H, shape.ffn_hidden_size),
    }
    return sizes[name.split(".")[-2]]


def expected_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint, by common name (see `weights.huggingface.common_name`)."""
    H, D = shape.hidden_size, shape.kv_channels
    result = {f"visual.{name}": size for name, size in visual_shapes(shape).items()}
    result["model.embed_tokens.weight"] = (shape.vocab_size, H)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        is_softmax = layer in shape.softmax_layers
        if not is_softmax and shape.linear_attention is not None:
            weights = shape.linear_attention.weight_shapes(H)
            result |= {f"{prefix}.linear_attn.{name}": size for name, size in weights.items()}
        for part in "qkv" if is_softmax else "":
            name = f"{prefix}.self_attn.{part}_proj.weight"
            result[name] = matrix_shape(shape, name)
            if shape.family.qkv_bias:
                result[f"{prefix}.self_attn.{part}_proj.bias"] = matrix_shape(shape, name)[:1]
            if shape.family.qk_norm and part != "v":
                result[f"{prefix}.self_attn.{part}_norm.weight"] = (D,)
        for place in (*(("self_attn.o",) if is_softmax else ()), "mlp.gate", "mlp.up", "mlp.down"):
            result[f"{prefix}.{place}_proj.weight"] = matrix_shape(shape, f"{prefix}.{place}_proj.weight")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            result[f"{prefix}.{norm}.weight"] = (H,)
    result["model.norm.weight"] = (H,)
    if not shape.tie_word_embeddings:
        result["lm_head.weight"] = (shape.vocab_size, H)
    return result


def adapter_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the shape of both factors of every adapter, by common name; empty for a model without adapters."""
    result: dict[str, tuple[int, ...]] = {}
    if shape.adapter is not None:
        for name, size in expected_shapes(shape).items():
            if name.startswith("model.layers.") and name.split(".")[-2] in shape.adapter.targets and len(size) == 2:
                result[adapter_weight(name, "A")] = (shape.adapter.rank, size[1])
                result[adapter_weight(name, "B")] = (size[0], shape.adapter.rank)
    return result


def stored_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that the parameters of a model are made of, adapters included."""
    return {**expected_shapes(shape), **adapter_shapes(shape)}
