"""Attention rows, policies and divergences as their formulas say, row by row, head by head and entry by entry, in
float64 and with gradient: what the fast implementations are compared with."""

import torch
from torch import Tensor

KINDS = ("jsd", "forward_kl", "reverse_kl")


def slow_attention(
    query: Tensor, prompt_key: Tensor, response_key: Tensor, prompt_lengths: Tensor, lag: int, scale: float
) -> Tensor:
    """[B, G, R, P + T]: softmax over the visible keys head by head, then the mean over heads."""
    B, G, R, n, _ = query.shape
    P, T, shared = prompt_key.shape[1], response_key.shape[2], n // prompt_key.shape[2]
    rows = []
    for b in range(B):
        length = int(prompt_lengths[b])
        for g in range(G):
            for r in range(R):
                own = min(max(r + 1 - lag, 0), T)
                mean = torch.zeros(length + own, dtype=query.dtype)
                for h in range(n):
                    keys = torch.cat([prompt_key[b, :length, h // shared], response_key[b, g, :own, h // shared]])
                    mean = mean + torch.softmax(scale * (keys @ query[b, g, r, h]), dim=-1) / n
                columns = torch.tensor([*range(length), *range(P, P + own)])
                rows.append(torch.zeros(P + T, dtype=query.dtype).index_copy(0, columns, mean))
    return torch.stack(rows).view(B, G, R, P + T)


def slow_policy(attention: Tensor, columns: Tensor, own: Tensor | None) -> Tensor:
    """Each row of [B, G, R, S] over the columns [B, S] without its own [B, R], over its sum; zeros without mass."""
    B, G, R, S = attention.shape
    rows = []
    for b in range(B):
        for g in range(G):
            for r in range(R):
                chosen = [bool(columns[b, j]) and (own is None or j != int(own[b, r])) for j in range(S)]
                kept = torch.where(torch.tensor(chosen), attention[b, g, r], 0.0)
                rows.append(kept / kept.sum() if float(kept.sum()) > 0 else kept)
    return torch.stack(rows).view(B, G, R, S)


def slow_divergence(p: Tensor, q: Tensor, kind: str) -> Tensor:
    """Of two distributions [S], term by term, with 0 ln 0 = 0 and ln 0 held at the logarithm of the smallest number."""
    tiny = torch.finfo(p.dtype).tiny

    def kl(a: Tensor, b: Tensor) -> Tensor:
        terms = [x * (torch.log(x) - torch.log(y.clamp(min=tiny))) for x, y in zip(a, b) if float(x) > 0]
        return sum(terms, torch.zeros((), dtype=p.dtype))

    mean = (p + q) / 2
    return {
        "jsd": lambda: (kl(p, mean) + kl(q, mean)) / 2,
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
    }[kind]()


def slow_divergences(p: Tensor, q: Tensor, kind: str) -> Tensor:
    """[B, G, R] of rows [B, G, R, S]; 0 where either has no mass."""
    values = [
        slow_divergence(a, b, kind) if float(a.sum()) > 0 and float(b.sum()) > 0 else 0.0 * a.sum()
        for a, b in zip(p.flatten(0, 2), q.expand_as(p).flatten(0, 2))
    ]
    return torch.stack(values).view(p.shape[:3])
