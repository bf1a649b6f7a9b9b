"""From queries and keys of response rows to the attention policy.

The paper's attention policy of response token t is the head-averaged attention of row t over everything before it,
renormalised without the token itself (eq. 2). Heads are averaged first and the average is renormalised after; the
other order is another distribution. All of it in float32 whatever the model runs in.

Tensor parallelism: `head_sum_attention` is the local partial (sum over this rank's heads), the sum over ranks is the
collective, `attention_policy` is what follows.
"""

import torch
from torch import Tensor


def head_sum_attention(query_BGRnD: Tensor, prompt_key_BPkD: Tensor, response_key_BGRkD: Tensor,
                       visible_BGRS: Tensor, scale: float) -> Tensor:
    """Softmax attention of every response row over [prompt; own response], summed over this rank's heads.

        out[b, g, r, j] = sum_h softmax_j(scale * q[b, g, r, h] . k[b, g, j, h])     over visible keys j

    Args:
        query_BGRnD: queries of the response rows after rotary embedding; n local heads.
        prompt_key_BPkD: keys of the prompt; k local key/value heads, k divides n (grouped-query attention).
        response_key_BGRkD: keys of each response's own tokens.
        visible_BGRS: bool, keys a row may see, itself included; a row that sees nothing gives zeros.
        scale: softmax scale, usually 1 / sqrt(D).

    Returns:
        [B, G, R, S] in float32 (float64 for float64 inputs), each row summing to n. Carries gradient to q and k.
    """
    B, G, R, n, D = query_BGRnD.shape
    k = prompt_key_BPkD.shape[2]
    dtype = torch.promote_types(query_BGRnD.dtype, torch.float32)
    query = query_BGRnD.to(dtype).reshape(B, G, R, k, n // k, D) * scale
    prompt_scores = torch.einsum("bgrkmd,bpkd->bgkmrp", query, prompt_key_BPkD.to(dtype))
    response_scores = torch.einsum("bgrkmd,bgskd->bgkmrs", query, response_key_BGRkD.to(dtype))
    scores = torch.cat([prompt_scores, response_scores], dim=-1)
    visible = visible_BGRS[:, :, None, None]
    # A finite floor instead of -inf: rows of padding, which see nothing, must not become NaN.
    scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
    attention = torch.softmax(scores, dim=-1) * visible
    return attention.sum(dim=(2, 3))


def attention_policy(attention_BGRS: Tensor, self_BGRS: Tensor) -> Tensor:
    """Attention policy of eq. (2): head-averaged attention without the row's own token, renormalised.

        p[i] = a[i] / sum_{j != self} a[j]

    Args:
        attention_BGRS: head-averaged attention, rows summing to 1 over the visible keys.
        self_BGRS: bool, True at the row's own token.

    Returns:
        [B, G, R, S], rows summing to 1; a row with no mass outside itself gives zeros. Carries gradient.
    """
    others = attention_BGRS.masked_fill(self_BGRS, 0.0)
    mass = others.sum(dim=-1, keepdim=True)
    return others / torch.where(mass > 0, mass, torch.ones_like(mass))
