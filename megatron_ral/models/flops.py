"""Floating-point operations of a model's passes, from its shape alone.

What is counted is the work that the model asks for, once: no recomputed activations, no padding, no optimizer. That is
the numerator of model FLOPs utilisation. Source: Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), appendix B; where that
takes 6 N per token and attention over all T keys, here matrices are counted one by one, attention over the keys that a row
of the group layout sees, and the LM head over the rows that predict a response token.
"""

import math
from typing import Sequence

from megatron_ral.models.shape import ModelShape
from megatron_ral.weights.conversion import visual_shapes


def group_flops(shape: ModelShape, prompt_length: int, response_lengths: Sequence[int]) -> float:
    """Forward FLOPs of the language model over one group [prompt | response 1 | ... | response G].

        layers * (2 * W * (P + sum_g R_g) + 4 * Q * pairs) + 2 * H * V * sum_g R_g
        W = H * (2 Q + 2 K) + 3 * H * F          weights of one layer's matrices
        pairs = P (P + 1) / 2 + sum_g (R_g P + R_g (R_g + 1) / 2)

    with H, F, V the hidden, feed-forward and vocabulary sizes, Q and K the widths of all query and all key heads. A
    multiplication and an addition are two. The backward pass takes twice as much.

    Args:
        prompt_length: P tokens, visual ones included, without padding.
        response_lengths: R_g tokens of each response; empty: the prompt alone.
    """
    hidden, query = shape.hidden_size, shape.num_attention_heads * shape.kv_channels
    weights = hidden * (2 * query + 2 * shape.num_query_groups * shape.kv_channels) + 3 * hidden * shape.ffn_hidden_size
    responses = sum(response_lengths)
    pairs = prompt_length * (prompt_length + 1) / 2 + sum(
        length * prompt_length + length * (length + 1) / 2 for length in response_lengths
    )
    return float(
        shape.num_layers * (2 * weights * (prompt_length + responses) + 4 * query * pairs)
        + 2 * hidden * shape.vocab_size * responses
    )


def tower_flops_per_patch(shape: ModelShape) -> float:
    """Forward FLOPs of the vision tower and its projector per patch: 2 * weights of its matrices, those of the projector
    once per visual token (merge^2 patches). The tower's attention is left out: it depends on windows, and is a few
    percent of the tower at the picture sizes of the paper."""
    per_token = shape.vision.spatial_merge_size**2
    weights = 0.0
    for name, size in visual_shapes(shape).items():
        if len(size) > 1 and not name.startswith("pos_embed"):
            weights += math.prod(size) / (per_token if "merger" in name else 1)
    return 2 * weights
