"""Gated delta rule: a linear attention whose state is a matrix that forgets, and that every token corrects.

With state S [Dk, Dv], query q, key k, value v, decay g <= 0 and step beta of each token:

    S <- exp(g) S;    S <- S + k beta (v - S^T k)^T;    output = S^T q

Source: Yang et al. 2024, Gated Delta Networks (arXiv 2412.06464). The form in chunks is derived from the recurrence, as
Yang et al. 2024 (arXiv 2406.06484) do without the decay: inside a chunk the corrections d of its tokens solve a
triangular system, so that a chunk takes matrix products in place of a loop over tokens.

Everything is float32. A token with beta = 0 and g = 0 leaves the state as it is, which is how padding is written.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Tokens of a chunk, the value that the published kernels use."""
_EPSILON = 1e-6
"""Number added to the squared length of queries and keys."""


def unit_vectors(vectors: Tensor) -> Tensor:
    """Return queries or keys [..., D] of length 1 in float32; carries gradient."""
    vectors = vectors.float()
    return vectors * torch.rsqrt(vectors.square().sum(dim=-1, keepdim=True) + _EPSILON)


def _scaled(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries of length Dk ** -0.5 and keys of length 1."""
    return unit_vectors(query) * query.shape[-1] ** -0.5, unit_vectors(key)


def gated_delta_rule(
    query_BLhD: Tensor,
    key_BLhD: Tensor,
    value_BLhD: Tensor,
    decay_BLh: Tensor,
    step_BLh: Tensor,
    state_BhKV: Optional[Tensor] = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Return outputs and the last state of whole sequences; both carry gradient.

    Args:
        query_BLhD: [B, L, k, Dk] of any length, which the rule divides by.
        key_BLhD: Like the queries.
        value_BLhD: [B, L, h, Dv]. Each of the k query and key heads serves h / k consecutive value heads.
        decay_BLh: Logarithm g <= 0 of the decay, [B, L, h] float32.
        step_BLh: Step beta in [0, 1], [B, L, h] float32.
        state_BhKV: State before the first token, [B, h, Dk, Dv] float32. None: zeros.
        chunk: Tokens of a chunk. It changes the result by rounding alone.

    Returns:
        (outputs [B, L, h, Dv], state [B, h, Dk, Dv]), float32.
    """
    B, L, h, Dv = value_BLhD.shape
    repeats = h // query_BLhD.shape[2]
    query, key = (part.repeat_interleave(repeats, dim=2) for part in _scaled(query_BLhD, key_BLhD))
    state = value_BLhD.new_zeros(B, h, key.shape[-1], Dv, dtype=torch.float32) if state_BhKV is None else state_BhKV
    if L == 0:
        return value_BLhD.float(), state
    chunk = min(chunk, L)
    padding = -L % chunk

    def chunks(part: Tensor) -> Tensor:
        """Return [B, L, h, D] as [B h, chunks, tokens, D]; padding is zero."""
        padded = F.pad(part, (0, 0, 0, 0, 0, padding))
        return padded.transpose(1, 2).reshape(B * h, -1, chunk, part.shape[-1])

    query, key, value = (chunks(part) for part in (query, key, value_BLhD.float()))
    step = chunks(step_BLh.float()[..., None])
    # decays[.., t] is the logarithm of the decay from the chunk's start to token t, itself included.
    decays = chunks(decay_BLh.float()[..., None])[..., 0].cumsum(dim=-1)
    between = decays[..., :, None] - decays[..., None, :]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=between.device).triu(1)
    between = between.masked_fill(later, float("-inf")).exp()  # from token s (column) to token t >= s (row)
    transposed = key.transpose(-1, -2)
    # (1 + M) d = beta (v - exp(decays) S^T k), M strictly lower triangular.
    system = (step * key) @ transposed * between
    read = key * decays.exp()[..., None]
    solved = torch.linalg.solve_triangular(
        system, step * torch.cat([value, read], dim=-1), upper=False, unitriangular=True
    )
    within = query @ transposed * between
    query = query * decays.exp()[..., None]
    written = (key * (decays[..., -1:] - decays).exp()[..., None]).transpose(-1, -2)
    kept = decays[..., -1].exp()[..., None, None]
    # Only the states go from chunk to chunk, by three operations each. The outputs follow from all of them at once.
    state, states, corrections = state.reshape(B * h, -1, Dv), [], []
    for own, of_state, addition, share in zip(
        *(part.unbind(1) for part in (*solved.split([Dv, key.shape[-1]], dim=-1), written, kept)), strict=True
    ):
        states.append(state)
        corrections.append(torch.baddbmm(own, of_state, state, alpha=-1))
        state = torch.baddbmm(state * share, addition, corrections[-1])
    outputs = query @ torch.stack(states, dim=1) + within @ torch.stack(corrections, dim=1)
    return outputs.view(B, h, -1, Dv)[:, :, :L].transpose(1, 2), state.view(B, h, -1, Dv)


def delta_step_(
    query_NhD: Tensor, key_NhD: Tensor, value_NhD: Tensor, decay_Nh: Tensor, step_Nh: Tensor, state_NhKV: Tensor
) -> Tensor:
    """Return the outputs [N, h, Dv] float32 of one token per row, and change the states in place; no gradient.

    Arguments are those of `gated_delta_rule` without L.
    """
    repeats = value_NhD.shape[1] // query_NhD.shape[1]
    query, key = (part.repeat_interleave(repeats, dim=1) for part in _scaled(query_NhD, key_NhD))
    state = state_NhKV.flatten(0, 1).mul_(decay_Nh.float().exp().flatten()[:, None, None])
    key = key.flatten(0, 1)[:, None]
    correction = step_Nh.float().flatten()[:, None, None] * (value_NhD.float().flatten(0, 1)[:, None] - key @ state)
    state.baddbmm_(key.transpose(1, 2), correction)
    return (query.flatten(0, 1)[:, None] @ state).view(value_NhD.shape)
