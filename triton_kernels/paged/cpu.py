"""Paged scatter on CPU in float32: one pass of numba code, in which keys turn on their way into the blocks.

vLLM's blocks on CPU keep keys transposed, [D, block size]: a tile of tokens is turned in a buffer that stays in the
core's cache, and written dim by dim.
"""

import numba as nb
import numpy as np
import torch
from torch import Tensor

from lmcache_blend.triton_kernels.rotation.cpu import U, flat, turn_row

TILE, LINE = 64, U(16)
"""Tokens of a tile, a block of vLLM's; numbers of a cache line."""
NOWHERE = -(1 << 62)


@nb.njit(nogil=True, cache=True, boundscheck=False)
def _scatter(cache, shape, strides, x, xshape, xstrides, positions, table, paged, cos, sin, first, half, interleaved):
    heads, n, dim = xshape
    count, size = shape
    starts = np.empty(n, np.int64)
    for t in range(n):
        block = positions[t] // size
        if positions[t] < 0:
            starts[t] = NOWHERE
            continue
        if paged:
            if block >= len(table):
                return positions[t]
            block = table[block]
        if block < 0 or block >= count:
            return positions[t]
        starts[t] = block * strides[0] + positions[t] % size * strides[1]
    across, down = U(strides[2]), U(strides[3])
    transposed = strides[3] != 1
    across_tile = U(dim) + LINE  # with none of the strides that share places in a core's cache
    tile = np.empty(TILE * (dim + 16), np.float32)
    t = 0
    while t < n:
        end = t + 1
        while end < min(n, t + TILE) and starts[end] == starts[end - 1] + strides[1]:
            end += 1
        if starts[t] >= 0:
            rows = U(end - t)
            for h in range(U(heads)):
                for j in range(rows):
                    at = h * U(xstrides[0]) + (U(t) + j) * U(xstrides[1])
                    angles = (U(t) + j) * U(half)
                    o = U(starts[U(t) + j]) + h * across
                    if transposed:
                        turn_row(tile, j * across_tile, x, at, U(dim), cos, sin, angles, U(first), U(half), interleaved)
                    else:
                        turn_row(cache, o, x, at, U(dim), cos, sin, angles, U(first), U(half), interleaved)
                if transposed:
                    o = U(starts[t]) + h * across
                    whole = rows // LINE * LINE
                    for d in range(U(dim)):
                        line = o + d * down
                        for j in range(U(0), whole, LINE):
                            for i in range(LINE):  # of known length: the compiler unrolls it
                                cache[line + j + i] = tile[(j + i) * across_tile + d]
                        for j in range(whole, rows):
                            cache[line + j] = tile[j * across_tile + d]
        t = end
    return np.int64(-1)


def scatter_f32(
    cache: Tensor,
    x: Tensor,
    positions: Tensor,
    table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    first: int,
    interleaved: bool,
) -> None:
    """x [H, n, D] into cache [blocks, block size, H, D], of any strides, at positions [n]; keys turned by cos and sin
    [n, R/2] where given. Raises IndexError, before anything is written, where a position lies outside."""
    nothing = x.new_empty(0)
    x = x if x.stride(2) == 1 else x.contiguous()
    places, blocks = (y.to(torch.int64).contiguous().numpy() for y in (positions, nothing if table is None else table))
    half = 0 if cos is None else cos.shape[1]
    tables = [nothing.numpy() if y is None else y.contiguous().flatten().numpy() for y in (cos, sin)]
    wrong = _scatter(
        flat(cache), tuple(cache.shape[:2]), cache.stride(), flat(x), tuple(x.shape), x.stride()[:2], places, blocks,
        table is not None, *tables, first, half, interleaved,
    )  # fmt: skip
    if wrong >= 0:
        raise IndexError(f"position {wrong} lies outside the {cache.shape[0]} blocks of {cache.shape[1]} tokens")
