"""Deviation and top-k on a GPU.

Top-k is a radix selection: scores become integers of the same order, four passes over their bytes find the one that the
last chosen token has, and a fifth writes the chosen tokens in ascending order, so that nothing is sorted.
"""

import triton
import triton.language as tl

from lmcache_blend.triton_kernels.paged.kernels import row_offsets


@triton.jit
def deviation_kernel(
    new, old, positions, table, out, tokens, heads, new_h, new_t, size, s_block, s_token, s_head,
    D: tl.constexpr, PD: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """out [2, N]: sums of squares of new - old and of new, [H, N, D] against tokens of a cache; without a place, 0."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = t < tokens
    d = tl.arange(0, PD)
    row, valid = row_offsets(positions, table, 0, t, mask, size, s_block, s_token)
    inside = valid[:, None] & (d < D)[None, :]
    distance = tl.zeros((BLOCK_T, PD), tl.float32)
    energy = tl.zeros((BLOCK_T, PD), tl.float32)
    for h in range(heads):
        x = new + tl.cast(h, tl.int64) * new_h + t.to(tl.int64) * new_t
        y = old + tl.cast(h, tl.int64) * s_head + row
        a = tl.load(x[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(y[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        distance += (a - b) * (a - b)
        energy += a * a
    tl.store(out + t, tl.sum(distance, 1), mask=mask)
    tl.store(out + tokens + t, tl.sum(energy, 1), mask=mask)


@triton.jit
def ordered(scores, candidate, i, tokens):
    """Unsigned integers in the order of the scores, 0 only for what is no candidate; NaN counts as the largest."""
    inside = i < tokens
    x = tl.load(scores + i, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(x == 0.0, 0.0, x)  # -0.0 equals 0.0
    bits = x.to(tl.uint32, bitcast=True)
    bits = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    bits = tl.where(x != x, 0xFFFFFFFF, bits)
    chosen = tl.load(candidate + i, mask=inside, other=0) != 0
    return tl.where(inside & chosen, bits, 0)


@triton.jit
def top_rows_kernel(scores, candidate, out, tokens, count, BLOCK: tl.constexpr):
    """One program: out [count] ascending positions; count is at most the number of candidates."""
    lane = tl.arange(0, BLOCK)
    bins = tl.arange(0, 256)
    prefix = tl.zeros((), tl.uint32)
    missing = count
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        found = tl.zeros((256,), tl.int32)
        for begin in range(0, tokens, BLOCK):
            key = ordered(scores, candidate, begin + lane, tokens)
            here = key > 0
            if step > 0:
                here = here & (key >> (shift + 8) == prefix >> (shift + 8))
            found += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=here)
        at_least = tl.cumsum(found, 0, reverse=True)
        digit = tl.max(tl.where(at_least >= missing, bins, 0), 0)
        missing -= tl.sum(tl.where(bins > digit, found, 0), 0)
        prefix = prefix | (digit.to(tl.uint32) << shift)
    written = 0
    for begin in range(0, tokens, BLOCK):
        i = begin + lane
        key = ordered(scores, candidate, i, tokens)
        equal = (key == prefix).to(tl.int32)
        first = tl.cumsum(equal, 0) <= missing
        take = ((key > prefix) | ((equal > 0) & first)).to(tl.int32)
        tl.store(out + written + tl.cumsum(take, 0) - 1, i.to(tl.int64), mask=take > 0)
        written += tl.sum(take, 0)
        missing -= tl.sum((take > 0).to(tl.int32) * equal, 0)
