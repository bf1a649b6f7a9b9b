"""Attention rows and their gradients in PyTorch, block by block, on any device.

No tensor of size heads x rows x keys is ever alive: a block holds the weights of one key/value head (or of all of them
where they are small), and the backward pass forms them again.
"""

import math
from typing import Iterator, NamedTuple

import torch
from torch import Tensor

from megatron_ral.attention import blocks
from megatron_ral.attention.backend import Gradients, SlopeOf
from megatron_ral.attention.types import Block, RowQK


class TorchBackend:
    """Backend that runs wherever PyTorch runs, in float32 or the wider type of the inputs."""

    def head_mean_rows(self, qk: RowQK) -> Tensor:
        B, G, R = qk.query_BGRnD.shape[:3]
        dtype = torch.promote_types(qk.query_BGRnD.dtype, torch.float32)
        result = torch.zeros(B, G, R, qk.num_keys, dtype=dtype, device=qk.query_BGRnD.device)
        for block in weight_blocks(qk):
            for heads in head_blocks(qk, block):
                result[block] += _weights(qk, block, heads).sum(dim=(1, 3))
        return result.div_(qk.num_heads)

    def add_gradients(self, qk: RowQK, slope_of: SlopeOf, gradients: Gradients) -> None:
        grad_query, grad_prompt, grad_response = gradients
        P = qk.prompt_key_BPkD.shape[1]
        for block in weight_blocks(qk):
            b, g, _ = block
            slope = slope_of(block)[:, None, :, None]  # [b, 1, g, 1, r, S]
            for heads in head_blocks(qk, block):
                weights = _weights(qk, block, heads)
                scores = weights * slope
                scores.addcmul_(weights, scores.sum(dim=-1, keepdim=True), value=-1)
                scores = scores.flatten(3, 4)  # [b, h, g, m r, S]
                del weights
                prompt, own, h = scores[..., :P], scores[..., P:], heads.index
                to_query = (prompt.flatten(2, 3) @ heads.prompt_key).view_as(heads.query)
                to_query = to_query.add_(own @ heads.response_key).mul_(qk.scale)
                to_query = to_query.unflatten(3, (qk.heads_per_key, -1)).permute(0, 2, 4, 1, 3, 5)
                grad_query[block].unflatten(3, (-1, qk.heads_per_key))[:, :, :, h] = to_query
                # heads.query carries the scale already
                for part, matrices, rows in zip(grad_prompt[b, :, h], prompt.flatten(2, 3), heads.rows):
                    for head, (matrix, vectors) in enumerate(zip(matrices, rows)):
                        part[:, head].addmm_(matrix.mT, vectors)
                grad_response[b, g, :, h] += (own.mT @ heads.query).permute(0, 2, 3, 1, 4)
                del scores, prompt, own, to_query  # before the next heads take as much


class HeadBlock(NamedTuple):
    """Key/value heads h of a block of rows, in float32 or wider: one head, or all where the block is small."""

    index: slice
    query: Tensor
    """[b, h, g, m r, D], scaled, with the m query heads that share a key."""
    prompt_key: Tensor
    """[b, h, P, D]."""
    response_key: Tensor
    """[b, h, g, T, D]."""

    @property
    def rows(self) -> Tensor:
        """Queries [b, h, g m r, D] against the prompt's keys, which all responses share."""
        return self.query.flatten(2, 3)


def weight_blocks(qk: RowQK) -> Iterator[Block]:
    """Yield blocks whose weights for one key/value head are a small part of a map of rows, so that several temporaries
    together are far below one map. Of a small map a part may be as large as a cache holds.

    Padding is left out in host memory. Elsewhere the host would have to wait for the lengths.
    """
    shape = qk.query_BGRnD.shape[:3]
    whole = math.prod(shape) * qk.num_keys
    elements = blocks.LARGE_BLOCK if whole < blocks.SMALL_MAP else max(blocks.SMALL_BLOCK, whole // 32)
    lengths = qk.num_rows_BG if qk.num_rows_BG is not None and qk.num_rows_BG.device.type == "cpu" else None
    for b, g, r in blocks.row_blocks(shape, qk.heads_per_key * qk.num_keys, elements):
        stop = r.stop if lengths is None else min(r.stop, int(lengths[b, g].max()))
        if r.start < stop:
            yield b, g, slice(r.start, stop)


def head_blocks(qk: RowQK, block: Block) -> Iterator[HeadBlock]:
    """Yield the key/value heads of a block of rows one by one, or all at once where the block is small."""
    b, g, r = block
    k = qk.prompt_key_BPkD.shape[2]
    dtype = torch.promote_types(qk.query_BGRnD.dtype, torch.float32)
    query = qk.query_BGRnD[b, g, r].unflatten(3, (k, -1))
    small = query.shape[:4].numel() * qk.heads_per_key * qk.num_keys <= blocks.SMALL_BLOCK
    for start in range(0, k, k if small else 1):
        h = slice(start, start + (k if small else 1))
        chosen = (query[:, :, :, h].to(dtype) * qk.scale).permute(0, 3, 1, 4, 2, 5).flatten(3, 4)
        yield HeadBlock(
            h,
            chosen,
            qk.prompt_key_BPkD[b, :, h].to(dtype).transpose(1, 2),
            qk.response_key_BGTkD[b, g, :, h].to(dtype).permute(0, 3, 1, 2, 4),
        )


def _weights(qk: RowQK, block: Block, heads: HeadBlock) -> Tensor:
    """Return softmax attention [b, h, g, m, r, S]."""
    b, _, r = block
    P, T, device = heads.prompt_key.shape[2], heads.response_key.shape[3], heads.query.device
    prompt = (heads.rows @ heads.prompt_key.mT).view(*heads.query.shape[:4], P)
    scores = torch.cat([prompt, heads.query @ heads.response_key.mT], dim=-1)
    del prompt
    scores = scores.unflatten(3, (qk.heads_per_key, -1))
    lengths = qk.prompt_lengths_B[b]
    if device.type != "cpu" or int(lengths.min()) < P:  # elsewhere the host would have to wait for the lengths
        padding = torch.arange(P, device=device) >= lengths[:, None]
        scores[..., :P].masked_fill_(padding[:, None, None, None, None], float("-inf"))
    later = torch.arange(T, device=device) > torch.arange(r.start, r.stop, device=device)[:, None] - qk.lag
    scores[..., P:].masked_fill_(later, float("-inf"))
    return torch.softmax(scores, dim=-1)
