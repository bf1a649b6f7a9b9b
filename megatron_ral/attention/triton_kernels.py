# Triton's types do not know that a constexpr is a number:
# pyright: reportArgumentType=false
# Triton's types do not know its knobs:
# pyright: reportAttributeAccessIssue=false
"""Triton kernels that form attention rows and their gradients with tiles of scores in registers.

    _row_statistics   rows of a tile and a head: loop over keys; normaliser of the softmax and, in the backward pass,
                      the slope's mean under it (scores formed once, in each of the two passes)
    _head_mean        a tile of the map of rows: loop over heads (scores once)
    _query_gradient   rows of a tile and a head: loop over keys (scores once, and a product with the keys)
    _key_gradient     a tile of keys of a key/value head: loop over its heads and all rows, of all responses where the
                      keys are the prompt's (scores once, and a product with the queries)

So forward and backward take 7 products of 2 x D x heads x rows x keys. Every output element belongs to one program,
which adds up in a fixed order: no atomics, equal bits on every run. Held: per head and row two numbers, and maps of
rows without a head dimension. Scores, softmax and sums are float32. Products take the inputs' type; for that, gradients
of scores are rounded to bfloat16, but not to float16, whose range is too small for gradients of 1e-9: they and the
inputs become tf32. float32 inputs take float32 products (`ieee`).

Tiles are 64 x 64 with 8 warps (two groups of four, which is what a product on Hopper takes): at width 128 an
accumulator, scores and a tile of the slope are then 64 float32 registers a thread, and the compiler for compute
capability 9.0 keeps all but some 150 bytes of the key gradient in registers; with 4 warps, or with 128 rows, it moves
up to 660 bytes of every thread to memory. Two stages: the next keys are on the way while these are used. In float32 a
product is made of plain multiply-adds whose operands sit in registers, hence 32 x 32 there. None of this has run on a
GPU yet, or was tuned on one.

Only this module, `triton_backend.py`, which launches the kernels, and `triton_formula_kernels.py` import Triton.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tile(NamedTuple):
    """Compile-time constants of a kernel."""

    ROWS: int
    KEYS: int
    BLOCK_D: int
    """Width padded to a power of two of at least 16, the least that a product takes."""
    PRECISION: str
    """Precision of products of float32 tiles."""
    WIDE: bool
    """True if tiles become float32 when read. Triton's interpreter needs it: it multiplies the bits of bfloat16."""
    num_warps: int
    num_stages: int


def tile_of(dtype: torch.dtype, width: int) -> Tile:
    """Return the constants for inputs of this type and head width."""
    side = 32 if dtype == torch.float32 else 64
    precision = "ieee" if dtype == torch.float32 else "tf32"
    return Tile(side, side, max(16, triton.next_power_of_2(width)), precision, triton.knobs.runtime.interpret, 8, 2)


@triton.jit
def _load(
    pointer, start, stride, size, D: tl.constexpr, COUNT: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr
):
    """Load vectors [COUNT, BLOCK_D] from number `start` on, with 0 from `size` on and beyond D. Only the corner's place
    is 64 bits wide, because a tile of wide pointers would take twice the registers."""
    local, columns = tl.arange(0, COUNT), tl.arange(0, BLOCK_D)
    mask = (start + local[:, None] < size) & (columns[None, :] < D)
    corner = pointer + tl.cast(start, tl.int64) * stride
    tile = tl.load(corner + (local[:, None] * stride + columns[None, :]), mask=mask, other=0.0)
    return tile.to(tl.float32) if WIDE else tile


@triton.jit
def _map_places(pointer, z, first_row, first_column, R, S, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Return pointers [ROWS, KEYS] into a map [.., R, S] whose corner may lie beyond 2^31 elements."""
    corner = pointer + (z * R + first_row) * S + first_column
    return corner + (tl.arange(0, ROWS)[:, None] * S + tl.arange(0, KEYS)[None, :])


@triton.jit
def _scores(query, key, columns, ends, scale, PRECISION: tl.constexpr):
    """Return scores [rows, keys] float32. A row sees the columns before its end."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    return tl.where(columns[None, :] < ends[:, None], scores, float("-inf"))


@triton.jit
def _product(weights, vectors, PRECISION: tl.constexpr):
    """Return weights @ vectors in the vectors' type, float16 widened (see the module)."""
    if vectors.dtype == tl.bfloat16:
        return tl.dot(weights.to(tl.bfloat16), vectors)
    return tl.dot(weights, vectors.to(tl.float32), input_precision=PRECISION)


@triton.jit
def _ends(rows, length, first_row, lag, T, PROMPT: tl.constexpr):
    """Return the number of keys that each row sees, of the prompt or of its response."""
    if PROMPT:
        return rows * 0 + length
    return tl.minimum(tl.maximum(rows + (first_row + 1 - lag), 0), T)


@triton.jit
def _row_statistics(
    query,
    prompt,
    response,
    lengths,
    slope,
    normaliser,
    inner,
    q_b,
    q_g,
    q_r,
    q_n,
    p_b,
    p_s,
    p_k,
    t_b,
    t_g,
    t_s,
    t_k,
    G,
    R,
    P,
    T,
    N,
    shared,
    first_row,
    lag,
    scale,
    SLOPE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Store normaliser[b, g, h, r] = log sum_j exp(score), inner = sum_j softmax_j slope_j in the same pass."""
    head, z = tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, g, kv = z // G, z % G, head // shared
    top = tl.program_id(0) * ROWS
    rows = top + tl.arange(0, ROWS)
    vectors = _load(query + b * q_b + g * q_g + tl.cast(head, tl.int64) * q_n, top, q_r, R, D, ROWS, BLOCK_D, WIDE)
    length = tl.load(lengths + b).to(tl.int32)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    for segment in tl.static_range(2):
        if segment == 0:
            keys, stride, offset = prompt + b * p_b + kv * p_k, p_s, 0
        else:
            keys, stride, offset = response + b * t_b + g * t_g + kv * t_k, t_s, P
        ends = _ends(rows, length, first_row, lag, T, segment == 0)
        last = tl.max(ends, 0)
        for start in range(0, last, KEYS):
            columns = start + tl.arange(0, KEYS)
            key = _load(keys, start, stride, last, D, KEYS, BLOCK_D, WIDE)
            scores = _scores(vectors, key, columns, ends, scale, PRECISION)
            higher = tl.maximum(best, tl.max(scores, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that sees nothing so far
            weights = tl.exp(scores - base[:, None])
            shrink = tl.exp(best - base)
            total = total * shrink + tl.sum(weights, 1)
            if SLOPE:
                places = _map_places(slope, z, top, offset + start, R, P + T, ROWS, KEYS)
                mask = (rows[:, None] < R) & (columns[None, :] < ends[:, None])
                weighted = weighted * shrink + tl.sum(weights * tl.load(places, mask=mask, other=0.0), 1)
            best = higher
    out = (z * N + head) * R + rows
    total = tl.where(total > 0, total, 1.0)
    tl.store(normaliser + out, tl.where(best == float("-inf"), 0.0, best) + tl.log(total), mask=rows < R)
    if SLOPE:
        tl.store(inner + out, weighted / total, mask=rows < R)


@triton.jit
def _head_mean(
    query,
    keys,
    lengths,
    normaliser,
    result,
    q_b,
    q_g,
    q_r,
    q_n,
    k_b,
    k_g,
    k_s,
    k_k,
    G,
    R,
    P,
    T,
    N,
    shared,
    lag,
    scale,
    total_heads,
    PROMPT: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Store result[b, g, r, column] over a tile of the prompt's keys or of the response's."""
    z = tl.program_id(2).to(tl.int64)
    b, g = z // G, z % G
    first_key, top = tl.program_id(0) * KEYS, tl.program_id(1) * ROWS
    columns, rows = first_key + tl.arange(0, KEYS), top + tl.arange(0, ROWS)
    size = P if PROMPT else T
    ends = _ends(rows, tl.load(lengths + b).to(tl.int32), 0, lag, T, PROMPT)
    sum_of_heads = tl.zeros([ROWS, KEYS], tl.float32)
    last = tl.max(ends, 0)
    for head in range(tl.where(first_key < last, N, 0)):
        wide = tl.cast(head, tl.int64)
        key = _load(keys + b * k_b + g * k_g + wide // shared * k_k, first_key, k_s, last, D, KEYS, BLOCK_D, WIDE)
        vectors = _load(query + b * q_b + g * q_g + wide * q_n, top, q_r, R, D, ROWS, BLOCK_D, WIDE)
        norm = tl.load(normaliser + (z * N + head) * R + rows, mask=rows < R, other=0.0)
        sum_of_heads += tl.exp(_scores(vectors, key, columns, ends, scale, PRECISION) - norm[:, None])
    places = _map_places(result, z, top, first_key + (0 if PROMPT else P), R, P + T, ROWS, KEYS)
    tl.store(places, sum_of_heads / total_heads, mask=(rows[:, None] < R) & (columns[None, :] < size))


@triton.jit
def _score_gradient(vectors, key, slope, norm, mean, rows, columns, ends, R, scale, PRECISION: tl.constexpr):
    """Return weights * (slope - mean) of a tile, [rows, keys] float32. `slope` are its `_map_places`."""
    mask = (rows[:, None] < R) & (columns[None, :] < ends[:, None])
    values = tl.load(slope, mask=mask, other=0.0)
    weights = tl.exp(_scores(vectors, key, columns, ends, scale, PRECISION) - norm[:, None])
    return tl.where(mask, weights * (values - mean[:, None]), 0.0)


@triton.jit
def _query_gradient(
    query,
    prompt,
    response,
    lengths,
    slope,
    normaliser,
    inner,
    result,
    q_b,
    q_g,
    q_r,
    q_n,
    p_b,
    p_s,
    p_k,
    t_b,
    t_g,
    t_s,
    t_k,
    o_b,
    o_g,
    o_r,
    o_n,
    G,
    R,
    P,
    T,
    N,
    shared,
    first_row,
    lag,
    scale,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Store result[b, g, r, h] = scale * sum_j dE_j k_j."""
    head, z = tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, g, kv = z // G, z % G, head // shared
    top = tl.program_id(0) * ROWS
    rows = top + tl.arange(0, ROWS)
    vectors = _load(query + b * q_b + g * q_g + tl.cast(head, tl.int64) * q_n, top, q_r, R, D, ROWS, BLOCK_D, WIDE)
    length = tl.load(lengths + b).to(tl.int32)
    norm = tl.load(normaliser + (z * N + head) * R + rows, mask=rows < R, other=0.0)
    mean = tl.load(inner + (z * N + head) * R + rows, mask=rows < R, other=0.0)
    gradient = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for segment in tl.static_range(2):
        if segment == 0:
            keys, stride, offset = prompt + b * p_b + kv * p_k, p_s, 0
        else:
            keys, stride, offset = response + b * t_b + g * t_g + kv * t_k, t_s, P
        ends = _ends(rows, length, first_row, lag, T, segment == 0)
        last = tl.max(ends, 0)
        for start in range(0, last, KEYS):
            columns = start + tl.arange(0, KEYS)
            key = _load(keys, start, stride, last, D, KEYS, BLOCK_D, WIDE)
            places = _map_places(slope, z, top, offset + start, R, P + T, ROWS, KEYS)
            scores = _score_gradient(vectors, key, places, norm, mean, rows, columns, ends, R, scale, PRECISION)
            gradient += _product(scores, key, PRECISION)
    width = tl.arange(0, BLOCK_D)
    place = result + b * o_b + g * o_g + tl.cast(head, tl.int64) * o_n + rows.to(tl.int64)[:, None] * o_r
    tl.store(place + width[None, :], gradient * scale, mask=(rows[:, None] < R) & (width[None, :] < D))


@triton.jit
def _key_gradient(
    query,
    keys,
    lengths,
    slope,
    normaliser,
    inner,
    result,
    q_b,
    q_g,
    q_r,
    q_n,
    k_b,
    k_g,
    k_s,
    k_k,
    o_b,
    o_g,
    o_s,
    o_k,
    G,
    R,
    P,
    T,
    N,
    shared,
    first_row,
    lag,
    scale,
    PROMPT: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add to result[b, (g,) j, k]: scale * sum over heads of k, rows (and responses, if PROMPT) of dE_j q."""
    kv, outer = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first_key = tl.program_id(0) * KEYS
    columns = first_key + tl.arange(0, KEYS)
    if PROMPT:
        b, first_response, responses, size = outer, outer * 0, G, P
    else:
        b, first_response, responses, size = outer // G, outer % G, 1, T
    length = tl.load(lengths + b).to(tl.int32)
    offset = 0 if PROMPT else P
    width = tl.arange(0, BLOCK_D)
    gradient = tl.zeros([KEYS, BLOCK_D], tl.float32)
    limit = length if PROMPT else T
    first = 0 if PROMPT else tl.maximum(first_key + lag - first_row, 0) // ROWS * ROWS  # rows before see none of these
    heads = tl.where(first_key < limit, shared, 0)
    for response in range(responses):
        g = first_response + response
        z = b * G + g
        key = _load(keys + b * k_b + g * k_g + kv * k_k, first_key, k_s, limit, D, KEYS, BLOCK_D, WIDE)
        for number in range(heads):
            head = kv * shared + number
            pointer = query + b * q_b + g * q_g + head * q_n
            for start in range(first, R, ROWS):
                rows = start + tl.arange(0, ROWS)
                vectors = _load(pointer, start, q_r, R, D, ROWS, BLOCK_D, WIDE)
                norm = tl.load(normaliser + (z * N + head) * R + rows, mask=rows < R, other=0.0)
                mean = tl.load(inner + (z * N + head) * R + rows, mask=rows < R, other=0.0)
                ends = _ends(rows, length, first_row, lag, T, PROMPT)
                places = _map_places(slope, z, start, offset + first_key, R, P + T, ROWS, KEYS)
                scores = _score_gradient(vectors, key, places, norm, mean, rows, columns, ends, R, scale, PRECISION)
                gradient += _product(tl.trans(scores), vectors, PRECISION)
    place = result + b * o_b + first_response * o_g + kv * o_k + columns.to(tl.int64)[:, None] * o_s + width[None, :]
    mask = (columns[:, None] < size) & (width[None, :] < D)
    tl.store(place, tl.load(place, mask=mask, other=0.0) + gradient * scale, mask=mask)
