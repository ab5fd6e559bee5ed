"""Paged gather and scatter on a GPU, with the keys turned on the way.

A cache is [blocks, block size, H, D] by strides, so NHD, HND, an interleaved K and V, and a dense buffer (one block
that holds every token) are one case. Offsets are 64 bits wide: a cache has more than 2^31 elements.
"""

import triton
import triton.language as tl

from lmcache_blend.triton_kernels.rotation.kernels import copy_rest, load_pairs, load_turn, store_pairs


@triton.jit
def row_offsets(positions, table, start, t, mask, size, s_block, s_token):
    """Offsets of tokens t in the cache and which of them are valid. positions, table: pointers or None."""
    if positions is None:
        p = start + t.to(tl.int64)
    else:
        p = tl.load(positions + t, mask=mask, other=-1).to(tl.int64)
    valid = mask & (p >= 0)
    p = tl.where(valid, p, 0)
    block = p // size
    if table is not None:
        block = tl.load(table + block, mask=valid, other=0).to(tl.int64)
    return block * s_block + (p % size) * s_token, valid


@triton.jit
def scatter_kernel(
    x, cache, positions, table, cos, sin, start, tokens, heads, x_h, x_t, size, s_block, s_token, s_head, table_t,
    D: tl.constexpr, FIRST: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """x [H, T, D] by strides -> cache, dims FIRST.. turned by the tables; HALF 0 turns nothing."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = t < tokens
    i = tl.arange(0, PAIRS)
    row, valid = row_offsets(positions, table, start, t, mask, size, s_block, s_token)
    if HALF > 0:
        c, s = load_turn(cos, sin, cos, sin, t, table_t, i, mask, HALF, 0)
    first_head = tl.program_id(1) * BLOCK_H
    for h in range(first_head, tl.minimum(first_head + BLOCK_H, heads)):
        source = x + tl.cast(h, tl.int64) * x_h + t.to(tl.int64) * x_t
        target = cache + row + tl.cast(h, tl.int64) * s_head
        if HALF > 0:
            a, b = load_pairs(source + FIRST, i, valid, HALF, INTERLEAVED)
            store_pairs(target + FIRST, a * c - b * s, b * c + a * s, i, valid, HALF, INTERLEAVED)
        copy_rest(source, target, valid, valid, FIRST, FIRST + 2 * HALF, D)


@triton.jit
def gather_kernel(
    cache, out, positions, table, cos, sin, start, tokens, heads, size, s_block, s_token, s_head, table_t,
    D: tl.constexpr, FIRST: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """cache -> out [H, T, D] contiguous, dims FIRST.. turned back; tokens without a place in the cache give zeros."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = t < tokens
    i = tl.arange(0, PAIRS)
    row, valid = row_offsets(positions, table, start, t, mask, size, s_block, s_token)
    if HALF > 0:
        c, s = load_turn(cos, sin, cos, sin, t, table_t, i, mask, HALF, 1)
    first_head = tl.program_id(1) * BLOCK_H
    for h in range(first_head, tl.minimum(first_head + BLOCK_H, heads)):
        source = cache + row + tl.cast(h, tl.int64) * s_head
        target = out + (tl.cast(h, tl.int64) * tokens + t) * D
        if HALF > 0:
            a, b = load_pairs(source + FIRST, i, valid, HALF, INTERLEAVED)
            store_pairs(target + FIRST, a * c - b * s, b * c + a * s, i, mask, HALF, INTERLEAVED)
        copy_rest(source, target, valid, mask, FIRST, FIRST + 2 * HALF, D)
