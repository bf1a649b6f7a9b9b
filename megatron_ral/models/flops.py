"""Floating-point operations of a model's passes, from its shape alone: the numerator of model FLOPs utilisation.

Each operation that the model asks for is counted once. Recomputed activations, padding and the optimizer are left out.

Source: Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), appendix B. The paper takes 6 N per token and attention over all
T keys. Here matrices are counted one by one, attention over the keys that a row of the group layout sees, and the LM
head over the rows that predict a response token.
"""

import math
from typing import Sequence

from megatron_ral.models.parameter_shapes import visual_shapes
from megatron_ral.models.shape import ModelShape


def group_flops(shape: ModelShape, prompt_length: int, response_lengths: Sequence[int]) -> float:
    """Return the forward FLOPs of the language model over one group [prompt | response 1 | ... | response G].

        layers * (2 * W * (P + sum_g R_g) + 4 * Q * pairs) - 2 * 3 * H * F * (P - 1) + 2 * H * V * sum_g R_g
        W = H * (2 Q + 2 K) + 3 * H * F          weights of one layer's matrices, with an output gate H * (3 Q + 2 K)
        pairs = P (P + 1) / 2 + sum_g (R_g P + R_g (R_g + 1) / 2)

    The last layer's feed-forward part reads one row of the prompt, because nothing reads what it makes of the others.

    A layer with linear attention has matrices and a convolution of its own, and per token and value head 6 * Dk * Dv in
    place of the pairs: two reads of the state and one write, as the recurrence has them.

    H, F and V are the hidden, feed-forward and vocabulary sizes; Q and K are the widths of all query and all key heads;
    Dk and Dv are the widths of a key and a value. A multiplication and an addition are two operations. The backward
    pass takes twice as many.

    Args:
        shape: Shape of the model.
        prompt_length: Number of prompt tokens P, visual ones included, without padding.
        response_lengths: Number of tokens R_g of each response; empty for the prompt alone.
    """
    hidden, query = shape.hidden_size, shape.num_attention_heads * shape.kv_channels
    queries = (3 if shape.family.output_gate else 2) * query  # with their gates, and the output matrix
    softmax = hidden * (queries + 2 * shape.num_query_groups * shape.kv_channels)
    layers = len(shape.softmax_layers)
    mlp = 3 * hidden * shape.ffn_hidden_size
    weights = layers * softmax + shape.num_layers * mlp
    linear = shape.linear_attention
    if linear is not None:
        sizes = [math.prod(size) for size in linear.weight_shapes(hidden).values() if len(size) > 1]
        rule = 3 * linear.num_value_heads * linear.key_head_dim * linear.value_head_dim
        weights += len(linear.layers) * (sum(sizes) + rule)
    responses = sum(response_lengths)
    pairs = prompt_length * (prompt_length + 1) / 2 + sum(
        length * prompt_length + length * (length + 1) / 2 for length in response_lengths
    )
    tokens = prompt_length + responses
    products = weights * tokens - mlp * (prompt_length - 1) + hidden * shape.vocab_size * responses
    return float(2 * products + layers * 4 * query * pairs)


def tower_flops_per_patch(shape: ModelShape) -> float:
    """Return the forward FLOPs of the vision tower and its projector per patch: 2 * the weights of their matrices.

    The projector's matrices are used once per visual token, which is merge^2 patches. The tower's attention is not
    counted, because it depends on windows; it is a few percent of the tower at the picture sizes of the paper.
    """
    merge, products = shape.patches.merge_size, shape.family.products_per_patch
    shapes = visual_shapes(shape).items()
    return 2 * sum(math.prod(size) * products(name, size, merge) for name, size in shapes)
