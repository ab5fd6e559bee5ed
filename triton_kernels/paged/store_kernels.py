"""A paged cache into quantised KV in one pass, the reverse of load_kernels.py: gather, turn back, quantise.

Steps and zeros are rounded to float16 before codes are taken against them; codes round half to even.
"""

import triton
import triton.language as tl

from lmcache_blend.triton_kernels.paged.kernels import row_offsets
from lmcache_blend.triton_kernels.paged.load_kernels import turn_dims
from lmcache_blend.triton_kernels.quantise.kernels import by_group, codes_of, extremes, scale_of
from lmcache_blend.triton_kernels.rotation.kernels import load_pairs, load_turn, store_pairs


@triton.jit
def turned_back(source, cos, sin, t, table_t, dims, readable, inside, FIRST: tl.constexpr, HALF: tl.constexpr,
                INTERLEAVED: tl.constexpr):  # fmt: skip
    """Dims [P] at pointers to cache rows, those of FIRST .. FIRST + 2 HALF turned back."""
    partner, c, s = turn_dims(cos, sin, t, table_t, dims, readable, FIRST, HALF, INTERLEAVED, 1)
    own = tl.load(source[:, None] + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(source[:, None] + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    return own * c + other * s


@triton.jit
def plain_pairs(source, cos, sin, t, table_t, off, i, readable, D: tl.constexpr, FIRST: tl.constexpr,
                HALF: tl.constexpr, TURN: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """Dims A and B of pairs off + i at pointers to cache rows, turned back; zeros where not readable."""
    if TURN == 2:
        first = 2 * (off + i) if INTERLEAVED else off + i
        second = first + 1 if INTERLEAVED else first + D // 2
        inside = readable[:, None] & (off + i < D // 2)[None, :]
        a = turned_back(source, cos, sin, t, table_t, first, readable, inside, FIRST, HALF, INTERLEAVED)
        b = turned_back(source, cos, sin, t, table_t, second, readable, inside, FIRST, HALF, INTERLEAVED)
    else:
        a, b = load_pairs(source + (2 * off if INTERLEAVED else off), i, readable, D // 2, INTERLEAVED)
        if TURN == 1:
            c, s = load_turn(cos + off, sin + off, cos, sin, t, table_t, i, readable, D // 2, 1)
            a, b = a * c - b * s, b * c + a * s
    return a, b


@triton.jit
def store_codes(row, a, b, off, i, mask, HALF: tl.constexpr, BITS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Codes of dims A and B of pairs off + i to pointers to rows of codes."""
    if BITS == 8:
        row = row + (2 * off if INTERLEAVED else off)
        store_pairs(row, a.to(tl.int32), b.to(tl.int32), i, mask, HALF, INTERLEAVED)
    else:
        both = (a.to(tl.int32) | (b.to(tl.int32) << 4)).to(tl.uint8)
        tl.store(row[:, None] + off + i[None, :], both, mask=mask[:, None] & (i < HALF)[None, :])


@triton.jit
def gather_quantised_tokens_kernel(
    cache, codes, steps, zeros, positions, table, cos, sin, two_over_top, start, tokens, size, s_block,
    s_token, s_head, table_t,
    D: tl.constexpr, P: tl.constexpr, FIRST: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, INTERLEAVED: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """codes of [H, T, D], steps [H, T, D / GROUP]: a step for GROUP dims of a token, GROUP a power of two or D."""
    TOP: tl.constexpr = (1 << BITS) - 2 if SYMMETRIC else (1 << BITS) - 1
    head = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = t < tokens
    i = tl.arange(0, P)
    row, valid = row_offsets(positions, table, start, t, mask, size, s_block, s_token)
    a, b = plain_pairs(
        cache + row + head.to(tl.int64) * s_head, cos, sin, t, table_t, 0, i, valid, D, FIRST, HALF, TURN, INTERLEAVED
    )
    line = head.to(tl.int64) * tokens + t
    # Pairs of a group: all, or a run of SIZE; where dims i and i + D/2 pair up, a and b are in different groups.
    WHOLE: tl.constexpr = GROUP == D
    SIZE: tl.constexpr = P if WHOLE else GROUP // 2 if INTERLEAVED else GROUP
    real = by_group(mask[:, None] & (i < D // 2)[None, :], SIZE)
    a, b = by_group(a, SIZE), by_group(b, SIZE)
    low_a, high_a = extremes(a, real, 2)
    low_b, high_b = extremes(b, real, 2)
    if WHOLE or INTERLEAVED:
        low_a, high_a = tl.minimum(low_a, low_b), tl.maximum(high_a, high_b)
        low_b, high_b = low_a, high_a
    g = tl.arange(0, P // SIZE)
    kept = mask[:, None] & (g * SIZE < D // 2)[None, :]
    zero_a, step_a = scale_of(tl.where(kept, low_a, 0.0), tl.where(kept, high_a, 0.0), two_over_top, TOP, SYMMETRIC)
    zero_b, step_b = scale_of(tl.where(kept, low_b, 0.0), tl.where(kept, high_b, 0.0), two_over_top, TOP, SYMMETRIC)
    at = line[:, None] * (D // GROUP) + g[None, :]
    tl.store(steps + at, step_a.to(tl.float16), mask=kept)
    if not SYMMETRIC:
        tl.store(zeros + at, zero_a.to(tl.float16), mask=kept)
    if not (WHOLE or INTERLEAVED):
        tl.store(steps + at + D // 2 // GROUP, step_b.to(tl.float16), mask=kept)
        if not SYMMETRIC:
            tl.store(zeros + at + D // 2 // GROUP, zero_b.to(tl.float16), mask=kept)
    a = tl.reshape(codes_of(a, zero_a[:, :, None], step_a[:, :, None], TOP), (BLOCK_T, P))
    b = tl.reshape(codes_of(b, zero_b[:, :, None], step_b[:, :, None], TOP), (BLOCK_T, P))
    store_codes(codes + line * (D * BITS // 8), a, b, 0, i, mask, D // 2, BITS, INTERLEAVED)


@triton.jit
def gather_quantised_channels_kernel(
    cache, codes, steps, zeros, positions, table, cos, sin, two_over_top, start, tokens, size, s_block,
    s_token, s_head, table_t,
    D: tl.constexpr, P: tl.constexpr, FIRST: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, INTERLEAVED: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """codes of [H, T, D], steps [H, ceil(T / GROUP), D]: a step for GROUP tokens of a dim; P divides D / 2.

    A program has P pairs. The cache is read twice, the second time from the GPU's own cache.
    """
    TOP: tl.constexpr = (1 << BITS) - 2 if SYMMETRIC else (1 << BITS) - 1
    group, head = tl.program_id(0), tl.program_id(1)
    off = tl.program_id(2) * P
    i = tl.arange(0, P)
    end = tl.minimum((group + 1) * GROUP, tokens)
    base = cache + head.to(tl.int64) * s_head
    low_a, low_b = tl.full((P,), float("inf"), tl.float32), tl.full((P,), float("inf"), tl.float32)
    high_a, high_b = tl.full((P,), float("-inf"), tl.float32), tl.full((P,), float("-inf"), tl.float32)
    for begin in range(group * GROUP, end, BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        mask = t < end
        row, valid = row_offsets(positions, table, start, t, mask, size, s_block, s_token)
        a, b = plain_pairs(base + row, cos, sin, t, table_t, off, i, valid, D, FIRST, HALF, TURN, INTERLEAVED)
        low, high = extremes(a, mask[:, None], 0)
        low_a, high_a = tl.minimum(low_a, low), tl.maximum(high_a, high)
        low, high = extremes(b, mask[:, None], 0)
        low_b, high_b = tl.minimum(low_b, low), tl.maximum(high_b, high)
    zero_a, step_a = scale_of(low_a, high_a, two_over_top, TOP, SYMMETRIC)
    zero_b, step_b = scale_of(low_b, high_b, two_over_top, TOP, SYMMETRIC)
    at = (head.to(tl.int64) * tl.num_programs(0) + group) * D
    first = 2 * (off + i) if INTERLEAVED else off + i
    second = first + 1 if INTERLEAVED else first + D // 2
    tl.store(steps + at + first, step_a.to(tl.float16))
    tl.store(steps + at + second, step_b.to(tl.float16))
    if not SYMMETRIC:
        tl.store(zeros + at + first, zero_a.to(tl.float16))
        tl.store(zeros + at + second, zero_b.to(tl.float16))
    for begin in range(group * GROUP, end, BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        mask = t < end
        row, valid = row_offsets(positions, table, start, t, mask, size, s_block, s_token)
        a, b = plain_pairs(base + row, cos, sin, t, table_t, off, i, valid, D, FIRST, HALF, TURN, INTERLEAVED)
        a = codes_of(a, zero_a[None, :], step_a[None, :], TOP)
        b = codes_of(b, zero_b[None, :], step_b[None, :], TOP)
        line = codes + (head.to(tl.int64) * tokens + t) * (D * BITS // 8)
        store_codes(line, a, b, off, i, mask, D // 2, BITS, INTERLEAVED)
