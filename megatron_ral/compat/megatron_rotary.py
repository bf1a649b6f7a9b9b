"""Rotary embedding by cosines and sines that were formed before, once for all layers.

megatron-core's attention forms the cosines and sines of the same angles again for queries and keys in every layer, a
third of the kernels of a decoding step. Its function for that takes the angles as `freqs`. Here `freqs` is
[2, S, B, 1, D]: cosines and sines, in the precision of the queries. Vectors that are wider keep their rest as it is.
The results are the same bit for bit.

A call with plain angles [S, B, 1, D] does what it did.

Tried on: megatron-core 0.16.1, 0.17.1, 0.18.2 and 0.19.2.
Retired by: `test_megatron_still_forms_rotations_in_every_layer`.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from torch import Tensor


def rotate(vectors: Tensor, freqs: Tensor, *rest: Any, **named: Any) -> Tensor:
    """Return queries or keys [S, B, heads, D or more] whose first D channels `freqs` rotates; carries gradient."""
    if freqs.dim() != 5:
        return apply_rotary_pos_emb(vectors, freqs, *rest, **named)
    cosine, sine = freqs
    width = cosine.shape[-1]
    if width < vectors.shape[-1]:
        return torch.cat([rotate(vectors[..., :width], freqs), vectors[..., width:]], dim=-1)
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cosine + torch.cat((-second, first), dim=-1) * sine


def use_prepared_rotation() -> None:
    """Make megatron-core's attention take cosines and sines in place of angles. Later calls do nothing."""
    from megatron.core.transformer import attention

    attention.apply_rotary_pos_emb = rotate
