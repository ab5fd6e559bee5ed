"""Quantised KV into a paged cache in one pass: the format of `../README.md`, "Quantised KV".

A tile is [tokens, P] of two dims each, A and B, that share a byte of 4-bit codes: i and i + D/2, or 2i and 2i + 1.
Where all dims turn these are the rotary pairs. Where only some do (PARTIAL) a dim's partner is loaded beside it.
"""

import triton
import triton.language as tl

from lmcache_blend.triton_kernels.paged.kernels import row_offsets
from lmcache_blend.triton_kernels.rotation.kernels import load_pairs, load_turn, store_pairs

NONE, WHOLE, PARTIAL = 0, 1, 2


@triton.jit
def step_pairs(steps, head, t, first_token, i, mask, rows, D: tl.constexpr, GT: tl.constexpr, GD: tl.constexpr,
               SHARED: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """Steps (or zeros) of dims A and B of pairs i, in shapes that broadcast to the tile; groups of GT tokens, GD dims.

    Either GT or GD is 1. SHARED: the tile lies within one group of tokens.
    """
    HALF: tl.constexpr = D // 2
    if GD >= D:
        a = tl.load(steps + (head.to(tl.int64) * rows + t // GT), mask=mask, other=0.0).to(tl.float32)[:, None]
        b = a
    elif GD == 1:
        if SHARED:
            row = tl.full((1,), first_token // GT, tl.int32)
            there = row >= 0
        else:
            row, there = t // GT, mask
        a, b = load_pairs(steps + (head.to(tl.int64) * rows + row) * D, i, there, HALF, INTERLEAVED)
    else:
        SIZE: tl.constexpr = GD // 2 if INTERLEAVED else GD  # pairs of a group
        g = tl.arange(0, i.shape[0] // SIZE)
        at = steps + (head.to(tl.int64) * rows + t)[:, None] * (D // GD) + g[None, :]
        inside = mask[:, None] & (g * SIZE < HALF)[None, :]
        a = over_pairs(tl.load(at, mask=inside, other=0.0).to(tl.float32), SIZE)
        b = a
        if not INTERLEAVED:
            b = over_pairs(tl.load(at + HALF // GD, mask=inside, other=0.0).to(tl.float32), SIZE)
    return a, b


@triton.jit
def over_pairs(x, SIZE: tl.constexpr):
    """[T, G] -> [T, G * SIZE], every value SIZE times."""
    wide = tl.broadcast_to(x[:, :, None], (x.shape[0], x.shape[1], SIZE))
    return tl.reshape(wide, (x.shape[0], x.shape[1] * SIZE))


@triton.jit
def code_pairs(row, i, mask, HALF: tl.constexpr, BITS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Codes of dims A and B as float32, from pointers to rows of codes."""
    if BITS == 8:
        a, b = load_pairs(row, i, mask, HALF, INTERLEAVED)
    else:
        both = tl.load(row[:, None] + i[None, :], mask=mask[:, None] & (i < HALF)[None, :], other=0).to(tl.int32)
        a, b = (both & 15).to(tl.float32), (both >> 4).to(tl.float32)
    return a, b


@triton.jit
def turn_dims(cos, sin, t, stride, dims, mask, FIRST: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
              MODE: tl.constexpr):  # fmt: skip
    """For dims of which FIRST .. FIRST + 2 HALF turn: a dim's partner (itself where it has none), cos, signed sin."""
    j = dims - FIRST
    turns = (j >= 0) & (j < 2 * HALF)
    lower = (j % 2 == 0) if INTERLEAVED else (j < HALF)
    index = j // 2 if INTERLEAVED else tl.where(lower, j, j - HALF)
    step: tl.constexpr = 1 if INTERLEAVED else HALF
    partner = tl.where(turns, dims + tl.where(lower, step, -step), dims)
    at = t.to(tl.int64)[:, None] * stride + index[None, :]
    inside = mask[:, None] & turns[None, :]
    c = tl.load(cos + at, mask=inside, other=1.0).to(tl.float32)
    s = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)
    if MODE == 1:
        norm = c * c + s * s
        c, s = c / norm, -s / norm
    return partner, c, tl.where(lower[None, :], -s, s)


@triton.jit
def value_dims(codes, steps, zeros, head, tokens, t, rows, dims, mask, D: tl.constexpr, GT: tl.constexpr,
               GD: tl.constexpr, BITS: tl.constexpr, INTERLEAVED: tl.constexpr, SYMMETRIC: tl.constexpr):  # fmt: skip
    """Dequantised dims [P] of tokens t, any dims."""
    BYTES: tl.constexpr = D * BITS // 8
    inside = mask[:, None] & (dims < D)[None, :]
    row = codes + (head.to(tl.int64) * tokens + t) * BYTES
    if BITS == 8:
        code = tl.load(row[:, None] + dims[None, :], mask=inside, other=0).to(tl.float32)
    else:
        byte = dims // 2 if INTERLEAVED else dims % (D // 2)
        shift = (dims % 2 if INTERLEAVED else dims // (D // 2)) * 4
        both = tl.load(row[:, None] + byte[None, :], mask=inside, other=0).to(tl.int32)
        code = ((both >> shift[None, :]) & 15).to(tl.float32)
    at = (head.to(tl.int64) * rows + t // GT)[:, None] * tl.cdiv(D, GD) + (dims // GD)[None, :]
    step = tl.load(steps + at, mask=inside, other=0.0).to(tl.float32)
    if SYMMETRIC:
        zero = -step * ((1 << (BITS - 1)) - 1)
    else:
        zero = tl.load(zeros + at, mask=inside, other=0.0).to(tl.float32)
    return code * step + zero


@triton.jit
def turned_dims(
    codes, steps, zeros, cos, sin, head, tokens, t, table_t, rows, dims, mask,
    D: tl.constexpr, FIRST: tl.constexpr, HALF: tl.constexpr, GT: tl.constexpr, GD: tl.constexpr, BITS: tl.constexpr,
    INTERLEAVED: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Dequantised and turned dims [P] of tokens t."""
    partner, c, s = turn_dims(cos, sin, t, table_t, dims, mask, FIRST, HALF, INTERLEAVED, 0)
    own = value_dims(codes, steps, zeros, head, tokens, t, rows, dims, mask, D, GT, GD, BITS, INTERLEAVED, SYMMETRIC)
    other = value_dims(
        codes, steps, zeros, head, tokens, t, rows, partner, mask, D, GT, GD, BITS, INTERLEAVED, SYMMETRIC
    )
    return own * c + other * s


@triton.jit
def scatter_quantised_kernel(
    codes, steps, zeros, cache, positions, table, cos, sin, start, tokens, rows, size, s_block, s_token, s_head,
    table_t, D: tl.constexpr, P: tl.constexpr, FIRST: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr,
    BITS: tl.constexpr, GT: tl.constexpr, GD: tl.constexpr, SHARED: tl.constexpr, INTERLEAVED: tl.constexpr,
    SYMMETRIC: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Codes of [H, T, D] with steps [H, rows, D / GD] -> dequantised, turned, written to tokens of the cache."""
    first_token, head = tl.program_id(0) * BLOCK_T, tl.program_id(1)
    t = first_token + tl.arange(0, BLOCK_T)
    mask = t < tokens
    i = tl.arange(0, P)
    row, valid = row_offsets(positions, table, start, t, mask, size, s_block, s_token)
    target = cache + row + head.to(tl.int64) * s_head
    if TURN == 2:
        a_dims = 2 * i if INTERLEAVED else i
        b_dims = 2 * i + 1 if INTERLEAVED else i + D // 2
        a_dims, b_dims = tl.where(i < D // 2, a_dims, D), tl.where(i < D // 2, b_dims, D)
        xa = turned_dims(
            codes, steps, zeros, cos, sin, head, tokens, t, table_t, rows, a_dims, mask, D, FIRST, HALF, GT, GD, BITS,
            INTERLEAVED, SYMMETRIC,
        )  # fmt: skip
        xb = turned_dims(
            codes, steps, zeros, cos, sin, head, tokens, t, table_t, rows, b_dims, mask, D, FIRST, HALF, GT, GD, BITS,
            INTERLEAVED, SYMMETRIC,
        )  # fmt: skip
        store_pairs(target, xa, xb, i, valid, D // 2, INTERLEAVED)
    else:
        source = codes + (head.to(tl.int64) * tokens + t) * (D * BITS // 8)
        a, b = code_pairs(source, i, mask, D // 2, BITS, INTERLEAVED)
        sa, sb = step_pairs(steps, head, t, first_token, i, mask, rows, D, GT, GD, SHARED, INTERLEAVED)
        if SYMMETRIC:
            a, b = (a - ((1 << (BITS - 1)) - 1)) * sa, (b - ((1 << (BITS - 1)) - 1)) * sb
        else:
            za, zb = step_pairs(zeros, head, t, first_token, i, mask, rows, D, GT, GD, SHARED, INTERLEAVED)
            a, b = a * sa + za, b * sb + zb
        if TURN == 1:
            c, s = load_turn(cos, sin, cos, sin, t, table_t, i, mask, D // 2, 0)
            a, b = a * c - b * s, b * c + a * s
        store_pairs(target, a, b, i, valid, D // 2, INTERLEAVED)
