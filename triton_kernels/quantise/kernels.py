"""Quantisation on a GPU: a program per tile of groups.

Tiles are [tokens, dims], dims contiguous; a group is a run of dims of one token (AXIS 1) or of tokens of one dim (AXIS
0). A group within one tile (ONCE) is read once, a longer one twice. Steps are rounded to float16 before codes are taken
against them; `tl.div_rn` and rounding to even give the reference's bits.
"""

import triton
import triton.language as tl

from lmcache_blend.triton_kernels.rotation.kernels import load_pairs, store_pairs


@triton.jit
def scale_of(low, high, two_over_top, TOP: tl.constexpr, SYMMETRIC: tl.constexpr):
    """(zero, step), float32 that are float16 numbers or an exact multiple of one."""
    if SYMMETRIC:
        step = (tl.maximum(high, -low) * two_over_top).to(tl.float16).to(tl.float32)
        zero = -step * (TOP // 2)
    else:
        step = tl.div_rn(high - low, tl.full(low.shape, TOP, tl.float32)).to(tl.float16).to(tl.float32)
        zero = low.to(tl.float16).to(tl.float32)
    return zero, step


@triton.jit
def codes_of(x, zero, step, TOP: tl.constexpr):
    """Nearest codes 0..TOP, float32; all of one value where the step is 0."""
    y = tl.div_rn(x - zero, tl.where(step > 0, step, float("inf")) + tl.zeros_like(x))
    return tl.minimum(tl.maximum((y + 12582912.0) - 12582912.0, 0.0), TOP)


@triton.jit
def tile_of(pid, g, tokens, dims, group, AXIS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens and dims of the first tile of group g, and where both end."""
    i, j = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    if AXIS == 1:
        t, d, end_t, end_d = pid * BLOCK_T + i, g * group + j, tokens, tl.minimum(dims, (g + 1) * group)
    else:
        t, d, end_t, end_d = g * group + i, pid * BLOCK_D + j, tl.minimum(tokens, (g + 1) * group), dims
    return t, d, end_t, end_d


@triton.jit
def load_tile(x, t, d, end_t, end_d, stride):
    """(values float32, which of them are)."""
    live = (t < end_t)[:, None] & (d < end_d)[None, :]
    v = tl.load(x + t.to(tl.int64)[:, None] * stride + d[None, :], mask=live, other=0)
    return v.to(tl.float32), live


@triton.jit
def place_of(t, d, g, h, tokens, dims, groups, AXIS: tl.constexpr):
    """Where the scales of a tile's groups stand, and which of them are."""
    if AXIS == 1:
        place, here = (h * tokens + t) * groups + g, t < tokens
    else:
        place, here = (h * groups + g) * dims + d, d < dims
    return place, here


@triton.jit
def quantise_groups(
    x, q, steps, zeros, tokens, dims, x_h, x_t, group, groups, two_over_top,
    TOP: tl.constexpr, SYMMETRIC: tl.constexpr, AXIS: tl.constexpr, ONCE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Codes in bytes. Grid: tiles across the groups' direction, groups, heads."""
    g, h = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, d, end_t, end_d = tile_of(tl.program_id(0), g, tokens, dims, group, AXIS, BLOCK_T, BLOCK_D)
    ALONG: tl.constexpr = BLOCK_D if AXIS == 1 else BLOCK_T
    place, here = place_of(t, d, g, h, tokens, dims, groups, AXIS)
    x += h * x_h
    q += h * tokens * dims
    v, live = load_tile(x, t, d, end_t, end_d, x_t)
    low, high = tl.min(tl.where(live, v, float("inf")), AXIS), tl.max(tl.where(live, v, float("-inf")), AXIS)
    if not ONCE:
        for b in range(ALONG, group, ALONG):
            w, more = load_tile(x, t + (1 - AXIS) * b, d + AXIS * b, end_t, end_d, x_t)
            low = tl.minimum(low, tl.min(tl.where(more, w, float("inf")), AXIS))
            high = tl.maximum(high, tl.max(tl.where(more, w, float("-inf")), AXIS))
    zero, step = scale_of(tl.where(here, low, 0.0), tl.where(here, high, 0.0), two_over_top, TOP, SYMMETRIC)
    tl.store(steps + place, step.to(tl.float16), mask=here)
    if not SYMMETRIC:
        tl.store(zeros + place, zero.to(tl.float16), mask=here)
    zero, step = tl.expand_dims(zero, AXIS), tl.expand_dims(step, AXIS)
    at = q + t.to(tl.int64)[:, None] * dims + d[None, :]
    tl.store(at, codes_of(v, zero, step, TOP).to(tl.uint8), mask=live)
    if not ONCE:
        for b in range(ALONG, group, ALONG):
            w, more = load_tile(x, t + (1 - AXIS) * b, d + AXIS * b, end_t, end_d, x_t)
            at += ALONG if AXIS == 1 else tl.cast(dims, tl.int64) * ALONG
            tl.store(at, codes_of(w, zero, step, TOP).to(tl.uint8), mask=more)


@triton.jit
def group_statistics(
    x, lows, highs, means, tokens, dims, x_h, x_t, group, groups,
    AXIS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Lowest, highest and mean value of every group, in one pass."""
    g, h = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, d, end_t, end_d = tile_of(tl.program_id(0), g, tokens, dims, group, AXIS, BLOCK_T, BLOCK_D)
    ALONG: tl.constexpr = BLOCK_D if AXIS == 1 else BLOCK_T
    ACROSS: tl.constexpr = BLOCK_T if AXIS == 1 else BLOCK_D
    place, here = place_of(t, d, g, h, tokens, dims, groups, AXIS)
    low, high = tl.full((ACROSS,), float("inf"), tl.float32), tl.full((ACROSS,), float("-inf"), tl.float32)
    total = tl.zeros((ACROSS,), tl.float32)
    for b in range(0, group, ALONG):
        v, live = load_tile(x + h * x_h, t + (1 - AXIS) * b, d + AXIS * b, end_t, end_d, x_t)
        low = tl.minimum(low, tl.min(tl.where(live, v, float("inf")), AXIS))
        high = tl.maximum(high, tl.max(tl.where(live, v, float("-inf")), AXIS))
        total += tl.sum(v, AXIS)
    count = (end_d if AXIS == 1 else end_t) - g * group
    tl.store(lows + place, low, mask=here)
    tl.store(highs + place, high, mask=here)
    tl.store(means + place, tl.div_rn(total, tl.zeros_like(total) + count), mask=here)


@triton.jit
def dequantise_groups(
    q, steps, zeros, out, tokens, dims, group, groups,
    HALF_TOP: tl.constexpr, SYMMETRIC: tl.constexpr, AXIS: tl.constexpr, SPREAD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Codes in bytes -> values. SPREAD: dims of a group if a tile holds whole groups (AXIS 1) or lies in one (AXIS 0),
    else 0. Grid: blocks of tokens, blocks of dims, heads."""
    h = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = (t < tokens)[:, None] & (d < dims)[None, :]
    at = (h * tokens + t)[:, None] * dims + d[None, :]
    code = tl.load(q + at, mask=live, other=0).to(tl.float32)
    if AXIS == 1 and SPREAD > 0:
        COUNT: tl.constexpr = BLOCK_D // SPREAD
        g = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
        place, kept = (h * tokens + t)[:, None] * groups + g[None, :], (t < tokens)[:, None] & (g < groups)[None, :]
    elif AXIS == 1:
        place, kept = (h * tokens + t)[:, None] * groups + (d // group)[None, :], live
    elif SPREAD > 0:
        place = (h * groups + tl.program_id(0) * BLOCK_T // group) * dims + d[None, :]
        kept = (d < dims)[None, :]
    else:
        place, kept = (h * groups + t // group)[:, None] * dims + d[None, :], live
    step = tl.load(steps + place, mask=kept, other=0).to(tl.float32)
    if SYMMETRIC:
        zero = -step * HALF_TOP
    else:
        zero = tl.load(zeros + place, mask=kept, other=0).to(tl.float32)
    if AXIS == 1 and SPREAD > 0:
        v = tl.reshape(by_group(code, SPREAD) * step[:, :, None] + zero[:, :, None], (BLOCK_T, BLOCK_D))
    else:
        v = code * step + zero
    tl.store(out + at, v.to(out.dtype.element_ty), mask=live)


@triton.jit
def by_group(x, SIZE: tl.constexpr):
    """[T, P] -> [T, P / SIZE, SIZE]."""
    return tl.reshape(x, (x.shape[0], x.shape[1] // SIZE, SIZE))


@triton.jit
def extremes(a, live, AXIS: tl.constexpr):
    return tl.min(tl.where(live, a, float("inf")), AXIS), tl.max(tl.where(live, a, float("-inf")), AXIS)


@triton.jit
def quantise_pairs(
    x, q, steps, zeros, tokens, x_h, x_t, groups, two_over_top,
    TOP: tl.constexpr, SYMMETRIC: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Per token, groups of GROUP dims of D = 2 HALF: both codes of a rotary pair in a byte. Grid: tokens, heads."""
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    here = t < tokens
    i = tl.arange(0, PAIRS)
    live = here[:, None] & (i < HALF)[None, :]
    a, b = load_pairs(x + h * x_h + t.to(tl.int64) * x_t, i, here, HALF, INTERLEAVED)
    # Pairs of a group: all, or a run of SIZE; where dims i and i + HALF pair up, a and b are in different groups.
    WHOLE: tl.constexpr = GROUP == 2 * HALF
    SIZE: tl.constexpr = PAIRS if WHOLE else GROUP // 2 if INTERLEAVED else GROUP
    COUNT: tl.constexpr = PAIRS // SIZE
    mask = by_group(live, SIZE)
    low_a, high_a = extremes(by_group(a, SIZE), mask, 2)
    low_b, high_b = extremes(by_group(b, SIZE), mask, 2)
    if WHOLE or INTERLEAVED:
        low_a, high_a = tl.minimum(low_a, low_b), tl.maximum(high_a, high_b)
        low_b, high_b = low_a, high_a
    k = tl.arange(0, COUNT)
    first = (h * tokens + t)[:, None] * groups + k[None, :]
    kept = here[:, None] & (k * SIZE < HALF)[None, :]
    zero_a, step_a = scale_of(tl.where(kept, low_a, 0.0), tl.where(kept, high_a, 0.0), two_over_top, TOP, SYMMETRIC)
    zero_b, step_b = scale_of(tl.where(kept, low_b, 0.0), tl.where(kept, high_b, 0.0), two_over_top, TOP, SYMMETRIC)
    tl.store(steps + first, step_a.to(tl.float16), mask=kept)
    if not SYMMETRIC:
        tl.store(zeros + first, zero_a.to(tl.float16), mask=kept)
    if not (WHOLE or INTERLEAVED):
        second = first + HALF // GROUP
        tl.store(steps + second, step_b.to(tl.float16), mask=kept)
        if not SYMMETRIC:
            tl.store(zeros + second, zero_b.to(tl.float16), mask=kept)
    code_a = codes_of(by_group(a, SIZE), zero_a[:, :, None], step_a[:, :, None], TOP).to(tl.uint8)
    code_b = codes_of(by_group(b, SIZE), zero_b[:, :, None], step_b[:, :, None], TOP).to(tl.uint8)
    packed = tl.reshape(code_a | (code_b << 4), (BLOCK_T, PAIRS))
    tl.store(q + (h * tokens + t)[:, None] * HALF + i[None, :], packed, mask=live)


@triton.jit
def store_scales(target, at, a, b, i, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A row of D scales, a and b those of the pairs' first and second dims."""
    if INTERLEAVED:
        j = tl.arange(0, 2 * i.shape[0])
        tl.store(target + at + j, tl.reshape(tl.join(a, b), (2 * i.shape[0],)).to(tl.float16), mask=j < 2 * HALF)
    else:
        tl.store(target + at + i, a.to(tl.float16), mask=i < HALF)
        tl.store(target + at + HALF + i, b.to(tl.float16), mask=i < HALF)


@triton.jit
def quantise_pair_channels(
    x, q, steps, zeros, tokens, x_h, x_t, group, groups, two_over_top,
    TOP: tl.constexpr, SYMMETRIC: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    ONCE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Per channel, groups of tokens: both codes of a rotary pair in a byte. Grid: groups, heads."""
    g, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t = g * group + tl.arange(0, BLOCK_T)
    end = tl.minimum(tokens, (g + 1) * group)
    i = tl.arange(0, PAIRS)
    x += h * x_h
    inside = (i < HALF)[None, :]
    live = (t < end)[:, None] & inside
    a, b = load_pairs(x + t.to(tl.int64) * x_t, i, t < end, HALF, INTERLEAVED)
    low_a, high_a = extremes(a, live, 0)
    low_b, high_b = extremes(b, live, 0)
    if not ONCE:
        for start in range(BLOCK_T, group, BLOCK_T):
            more = (t + start < end)[:, None] & inside
            c, d = load_pairs(x + (t + start).to(tl.int64) * x_t, i, t + start < end, HALF, INTERLEAVED)
            low_c, high_c = extremes(c, more, 0)
            low_d, high_d = extremes(d, more, 0)
            low_a, high_a = tl.minimum(low_a, low_c), tl.maximum(high_a, high_c)
            low_b, high_b = tl.minimum(low_b, low_d), tl.maximum(high_b, high_d)
    kept = i < HALF
    zero_a, step_a = scale_of(tl.where(kept, low_a, 0.0), tl.where(kept, high_a, 0.0), two_over_top, TOP, SYMMETRIC)
    zero_b, step_b = scale_of(tl.where(kept, low_b, 0.0), tl.where(kept, high_b, 0.0), two_over_top, TOP, SYMMETRIC)
    row = (h * groups + g) * 2 * HALF
    store_scales(steps, row, step_a, step_b, i, HALF, INTERLEAVED)
    if not SYMMETRIC:
        store_scales(zeros, row, zero_a, zero_b, i, HALF, INTERLEAVED)
    zero_a, step_a, zero_b, step_b = zero_a[None, :], step_a[None, :], zero_b[None, :], step_b[None, :]
    packed = codes_of(a, zero_a, step_a, TOP).to(tl.uint8) | (codes_of(b, zero_b, step_b, TOP).to(tl.uint8) << 4)
    tl.store(q + (h * tokens + t)[:, None] * HALF + i[None, :], packed, mask=live)
    if not ONCE:
        for start in range(BLOCK_T, group, BLOCK_T):
            more = (t + start < end)[:, None] & inside
            c, d = load_pairs(x + (t + start).to(tl.int64) * x_t, i, t + start < end, HALF, INTERLEAVED)
            low = codes_of(c, zero_a, step_a, TOP).to(tl.uint8)
            packed = low | (codes_of(d, zero_b, step_b, TOP).to(tl.uint8) << 4)
            tl.store(q + (h * tokens + t + start)[:, None] * HALF + i[None, :], packed, mask=more)


@triton.jit
def load_scales(source, row, i, inside, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Scales per channel of both dims of pairs i, float32: a row of D for each of `row` [T, 1]."""
    if INTERLEAVED:
        j = tl.arange(0, 2 * i.shape[0])
        both = tl.load(source + row + j[None, :], mask=inside & (j < 2 * HALF)[None, :], other=0)
        a, b = tl.split(tl.reshape(both, (row.shape[0], i.shape[0], 2)))
    else:
        a = tl.load(source + row + i[None, :], mask=inside & (i < HALF)[None, :], other=0)
        b = tl.load(source + row + HALF + i[None, :], mask=inside & (i < HALF)[None, :], other=0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def dequantise_pair_channels(
    q, steps, zeros, out, tokens, group, groups,
    HALF_TOP: tl.constexpr, SYMMETRIC: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr,
    PAIRS: tl.constexpr, ONE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Nibbles of rotary pairs -> values, scales per channel. ONE: a tile lies in one group. Grid: tokens, heads."""
    h = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_T
    t = first + tl.arange(0, BLOCK_T)
    i = tl.arange(0, PAIRS)
    live = (t < tokens)[:, None] & (i < HALF)[None, :]
    code = tl.load(q + (h * tokens + t)[:, None] * HALF + i[None, :], mask=live, other=0)
    if ONE:
        row = tl.full((1, 1), 0, tl.int64) + (h * groups + first // group) * 2 * HALF
        inside = row >= 0
    else:
        row, inside = (h * groups + t // group)[:, None] * 2 * HALF, (t < tokens)[:, None]
    step_a, step_b = load_scales(steps, row, i, inside, HALF, INTERLEAVED)
    if SYMMETRIC:
        zero_a, zero_b = -step_a * HALF_TOP, -step_b * HALF_TOP
    else:
        zero_a, zero_b = load_scales(zeros, row, i, inside, HALF, INTERLEAVED)
    a = (code & 15).to(tl.float32) * step_a + zero_a
    b = (code >> 4).to(tl.float32) * step_b + zero_b
    store_pairs(out + (h * tokens + t) * (2 * HALF), a, b, i, t < tokens, HALF, INTERLEAVED)


@triton.jit
def dequantise_pairs(
    q, steps, zeros, out, tokens, groups,
    HALF_TOP: tl.constexpr, SYMMETRIC: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr,
    PAIRS: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Nibbles of rotary pairs -> values, scales per token and group of GROUP dims. Grid: tokens, heads."""
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    i = tl.arange(0, PAIRS)
    live = (t < tokens)[:, None] & (i < HALF)[None, :]
    code = tl.load(q + (h * tokens + t)[:, None] * HALF + i[None, :], mask=live, other=0)
    WHOLE: tl.constexpr = GROUP == 2 * HALF
    SIZE: tl.constexpr = PAIRS if WHOLE else GROUP // 2 if INTERLEAVED else GROUP
    APART: tl.constexpr = 0 if WHOLE or INTERLEAVED else HALF // GROUP
    k = tl.arange(0, PAIRS // SIZE)
    place = steps + (h * tokens + t)[:, None] * groups + k[None, :]
    kept = (t < tokens)[:, None] & (k * SIZE < HALF)[None, :]
    step_a = tl.load(place, mask=kept, other=0).to(tl.float32)
    step_b = tl.load(place + APART, mask=kept, other=0).to(tl.float32) if APART > 0 else step_a
    if SYMMETRIC:
        zero_a, zero_b = -step_a * HALF_TOP, -step_b * HALF_TOP
    else:
        base = zeros + (h * tokens + t)[:, None] * groups + k[None, :]
        zero_a = tl.load(base, mask=kept, other=0).to(tl.float32)
        zero_b = tl.load(base + APART, mask=kept, other=0).to(tl.float32) if APART > 0 else zero_a
    a = by_group((code & 15).to(tl.float32), SIZE) * step_a[:, :, None] + zero_a[:, :, None]
    b = by_group((code >> 4).to(tl.float32), SIZE) * step_b[:, :, None] + zero_b[:, :, None]
    a, b = tl.reshape(a, (BLOCK_T, PAIRS)), tl.reshape(b, (BLOCK_T, PAIRS))
    store_pairs(out + (h * tokens + t) * (2 * HALF), a, b, i, t < tokens, HALF, INTERLEAVED)
