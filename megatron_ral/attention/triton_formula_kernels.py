# Triton's types do not know that a constexpr is a number, nor what a kernel's function returns:
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
"""Triton kernels of formulas over head-averaged rows: one program per row, which reads it once or twice.

    _mass_of_rows           mass of each row on its keys
    _distribution_of_rows   attention divided by the mass
    _masses_of_rows         masses of the distribution on parts of the input, and its entropy
    _divergence_of_rows     divergence of the distribution from the target
    _slope_of_rows          dD/da of every element times the gradient of the row

All others read the mass that the first has formed. The compiler may sum in another order in another kernel, and rows
that are equal bit for bit must have equal distributions. The formulas are those of `divergence.py`, in float32, and
the reasons for their form are given there.

Only `triton_formulas.py`, which launches the kernels, imports this module.
"""

import triton
import triton.language as tl

TINY = tl.constexpr(1.1754943508222875e-38)
"""Smallest normal float32."""
LEAST_MASS = tl.constexpr(1.1754943508222875e-38 * 2**26)
LARGEST_SLOPE = tl.constexpr(3.4028234663852886e38 / 2**10)


@triton.jit
def _open_row(attention, columns, own, a_b, a_g, a_r, c_b, o_b, o_r, G, R, OWN: tl.constexpr):
    """Return (b, g, r) of the program's row, 64 bits wide, pointers to its attention and columns, and its own column.

    Without columns of their own it is one that no row has.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    b, g, r = row // (G * R), row // R % G, row % R
    place = tl.load(own + b * o_b + r * o_r) if OWN else tl.cast(-1, tl.int64)
    return b, g, r, attention + b * a_b + g * a_g + r * a_r, columns + b * c_b, place


@triton.jit
def _read(attention, columns, own, start, S, OWN: tl.constexpr, BLOCK: tl.constexpr):
    """Return (columns of a block, whether each exists, 1 for the keys that count, else 0, attention on those)."""
    places = start + tl.arange(0, BLOCK)
    inside = places < S
    counted = tl.load(columns + places, mask=inside, other=0) != 0
    if OWN:
        counted = counted & (places != own)
    counted = counted.to(tl.float32)
    return places, inside, counted, tl.load(attention + places, mask=inside, other=0.0) * counted


@triton.jit
def _divisor(mass):
    """Return what attention is divided by: the mass, or infinity where there is none."""
    return tl.where(mass > 0, mass, float("inf"))


@triton.jit
def _log_at_least_tiny(x):
    return tl.log(tl.maximum(x, TINY, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _log1p(x):
    """Return ln(1 + x) without loss for small x: the rounding of 1 + x is divided out."""
    one_more = 1.0 + x
    rounded = one_more - 1.0
    return tl.where(rounded == 0.0, x, tl.log(one_more) * tl.div_rn(x, tl.where(rounded == 0.0, 1.0, rounded)))


@triton.jit
def _contrast(p, q):
    total = p + q
    return total, tl.where(total > 0, tl.div_rn(p - q, tl.where(total > 0, total, 1.0)), 0.0)


@triton.jit
def _phi(x):
    square = x * x
    series = square * (1 / 2 + square * (1 / 12 + square * (1 / 30 + square * (1 / 56 + square * (1 / 90)))))
    more, less = 1.0 + x, 1.0 - x
    direct = more * tl.log(tl.where(more > 0, more, 1.0)) + less * tl.log(tl.where(less > 0, less, 1.0))
    return tl.where(tl.abs(x) < 0.15, series, 0.5 * direct)


@triton.jit
def _excess(u):
    series = u * 0.0
    for step in tl.static_range(8):
        series = series * -u + 1.0 / (9 - step)
    return tl.where(tl.abs(u) < 0.03, u * u * series, u - _log1p(u))


@triton.jit
def _kl(p, q):
    difference = q - p
    near = tl.abs(difference) < 0.5 * p
    ratio = tl.where(near, tl.div_rn(difference, tl.where(p > 0, p, 1.0)), 0.0)
    far = p * (_log_at_least_tiny(p) - _log_at_least_tiny(q) - 1.0) + q
    return tl.where(near, p * _excess(ratio), tl.maximum(far, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _value(p, q, KIND: tl.constexpr):
    """Return the terms of a divergence."""
    if KIND == "jsd":
        total, x = _contrast(p, q)
        return 0.5 * total * _phi(x)
    if KIND == "forward_kl":
        return _kl(q, p)
    if KIND == "reverse_kl":
        return _kl(p, q)
    return -q * _log_at_least_tiny(p)


@triton.jit
def _slope(p, q, KIND: tl.constexpr):
    """Return dD/dp up to a constant per row."""
    if KIND == "jsd":
        _, x = _contrast(p, q)
        slope = 0.5 * _log1p(tl.maximum(x, -1.0 + 2.0**-23, propagate_nan=tl.PropagateNan.ALL))
    elif KIND == "forward_kl":
        slope = tl.div_rn(p - q, tl.maximum(p, TINY, propagate_nan=tl.PropagateNan.ALL))
    elif KIND == "reverse_kl":
        slope = _log_at_least_tiny(p) - _log_at_least_tiny(q)
    else:
        slope = tl.div_rn(-q, tl.maximum(p, TINY, propagate_nan=tl.PropagateNan.ALL))
    return tl.where(p > 0, slope, 0.0)


@triton.jit
def _mass_of_rows(
    attention,
    columns,
    own,
    mass_of,
    a_b,
    a_g,
    a_r,
    c_b,
    o_b,
    o_r,
    G,
    R,
    S,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    _b, _g, _r, attention, columns, place = _open_row(attention, columns, own, a_b, a_g, a_r, c_b, o_b, o_r, G, R, OWN)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, S, BLOCK):
        _, _, _, value = _read(attention, columns, place, start, S, OWN, BLOCK)
        total += value
    tl.store(mass_of + row, tl.sum(total))


@triton.jit
def _distribution_of_rows(
    attention,
    columns,
    own,
    mass_of,
    result,
    a_b,
    a_g,
    a_r,
    c_b,
    o_b,
    o_r,
    G,
    R,
    S,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    _b, _g, _r, attention, columns, place = _open_row(attention, columns, own, a_b, a_g, a_r, c_b, o_b, o_r, G, R, OWN)
    divisor = _divisor(tl.load(mass_of + row))
    result += tl.cast(row, tl.int64) * S
    for start in range(0, S, BLOCK):
        places, inside, _, value = _read(attention, columns, place, start, S, OWN, BLOCK)
        tl.store(result + places, tl.div_rn(value, divisor), mask=inside)


@triton.jit
def _masses_of_rows(
    attention,
    columns,
    own,
    mass_of,
    visual,
    target,
    result,
    a_b,
    a_g,
    a_r,
    c_b,
    o_b,
    o_r,
    v_b,
    t_b,
    G,
    R,
    S,
    P,
    rows,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    b, _g, _r, attention, columns, place = _open_row(attention, columns, own, a_b, a_g, a_r, c_b, o_b, o_r, G, R, OWN)
    divisor = _divisor(tl.load(mass_of + row))
    on_visual = tl.zeros([BLOCK], tl.float32)
    on_target, on_prompt, first, entropy = on_visual, on_visual, on_visual, on_visual
    for start in range(0, S, BLOCK):
        places, _, _, value = _read(attention, columns, place, start, S, OWN, BLOCK)
        p = tl.div_rn(value, divisor)
        of_prompt = places < P
        on_visual += p * tl.load(visual + b * v_b + places, mask=of_prompt, other=0).to(tl.float32)
        on_target += p * tl.load(target + b * t_b + places, mask=of_prompt, other=0).to(tl.float32)
        on_prompt += tl.where(of_prompt, p, 0.0)
        first += tl.where(places == 0, p, 0.0)
        entropy -= p * tl.log(tl.where(p > 0, p, 1.0))
    seen = tl.sum(on_visual)
    tl.store(result + row, seen)
    tl.store(result + rows + row, tl.sum(on_prompt))
    tl.store(result + 2 * rows + row, tl.sum(first))
    tl.store(result + 3 * rows + row, tl.load(attention + place) if OWN else 0.0)
    tl.store(result + 4 * rows + row, tl.sum(entropy))
    share = tl.div_rn(tl.sum(on_target), tl.maximum(seen, TINY, propagate_nan=tl.PropagateNan.ALL))
    tl.store(result + 5 * rows + row, share)


@triton.jit
def _divergence_of_rows(
    attention,
    columns,
    own,
    mass_of,
    target,
    result,
    a_b,
    a_g,
    a_r,
    c_b,
    o_b,
    o_r,
    t_b,
    t_g,
    t_r,
    G,
    R,
    S,
    KIND: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    b, g, r, attention, columns, place = _open_row(attention, columns, own, a_b, a_g, a_r, c_b, o_b, o_r, G, R, OWN)
    target += b * t_b + g * t_g + r * t_r
    mass = tl.load(mass_of + row)
    divisor = _divisor(mass)
    terms = tl.zeros([BLOCK], tl.float32)
    wanted = terms
    for start in range(0, S, BLOCK):
        places, inside, _, value = _read(attention, columns, place, start, S, OWN, BLOCK)
        q = tl.load(target + places, mask=inside, other=0.0)
        terms += _value(tl.div_rn(value, divisor), q, KIND)
        wanted += q
    is_compared = (mass > 0) & (tl.sum(wanted) > 0)
    tl.store(result + row, tl.where(is_compared, tl.sum(terms), 0.0))


@triton.jit
def _slope_of_rows(
    attention,
    columns,
    own,
    mass_of,
    target,
    grad,
    result,
    a_b,
    a_g,
    a_r,
    c_b,
    o_b,
    o_r,
    t_b,
    t_g,
    t_r,
    m_b,
    m_g,
    m_r,
    G,
    R,
    S,
    KIND: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    b, g, r, attention, columns, place = _open_row(attention, columns, own, a_b, a_g, a_r, c_b, o_b, o_r, G, R, OWN)
    target += b * t_b + g * t_g + r * t_r
    mass = tl.load(mass_of + b * m_b + g * m_g + r * m_r)
    factor = tl.load(grad + b * m_b + g * m_g + r * m_r)
    divisor = _divisor(mass)
    products = tl.zeros([BLOCK], tl.float32)
    wanted = products
    for start in range(0, S, BLOCK):
        places, inside, _, value = _read(attention, columns, place, start, S, OWN, BLOCK)
        q = tl.load(target + places, mask=inside, other=0.0)
        p = tl.div_rn(value, divisor)
        products += p * _slope(p, q, KIND)
        wanted += q
    inner = tl.sum(products)
    is_compared = (mass > 0) & (tl.sum(wanted) > 0)
    scale = tl.where(is_compared, tl.maximum(mass, LEAST_MASS, propagate_nan=tl.PropagateNan.ALL), float("inf"))
    result += tl.cast(row, tl.int64) * S
    for start in range(0, S, BLOCK):
        places, inside, counted, value = _read(attention, columns, place, start, S, OWN, BLOCK)
        q = tl.load(target + places, mask=inside, other=0.0)
        slope = tl.div_rn(_slope(tl.div_rn(value, divisor), q, KIND) - inner, scale)
        slope = tl.clamp(slope, -LARGEST_SLOPE, LARGEST_SLOPE, propagate_nan=tl.PropagateNan.ALL)
        tl.store(result + places, slope * counted * factor, mask=inside)
