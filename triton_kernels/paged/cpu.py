"""Paged scatter on CPU in float32: one pass of numba code, in which keys turn on their way into the blocks.

vLLM's blocks on CPU keep keys transposed, [D, block size]: a tile of tokens is turned in a buffer that stays in the
core's cache, and written dim by dim.
"""

import numba as nb
import numpy as np
import torch
from torch import Tensor

from lmcache_blend.triton_kernels.rotation.cpu import MOST, U, float32_at, int64_at, turn_row

TILE, LINE = 64, U(16)
"""Tokens of a tile, a block of vLLM's; numbers of a cache line."""
NOWHERE = -(1 << 62)


@nb.njit(nogil=True, cache=True, boundscheck=False)
def _scatter(target, shape, strides, source, source_shape, source_strides, start, where, blocks, length, cosines, sines,
             first, half, interleaved):  # fmt: skip
    """Addresses: target and source of float32; where [n] int64 positions, 0: from start on; blocks [length] int64, 0:
    no table; cosines, sines [n, half]. Returns -1, or a position that lies outside, before anything is written."""
    heads, n, dim = source_shape
    count, size = shape
    cache, x = nb.carray(float32_at(target), (MOST,)), nb.carray(float32_at(source), (MOST,))
    cos, sin = nb.carray(float32_at(cosines), (MOST,)), nb.carray(float32_at(sines), (MOST,))
    positions, table = nb.carray(int64_at(where), (MOST,)), nb.carray(int64_at(blocks), (MOST,))
    starts = np.empty(n, np.int64)
    for t in range(n):
        position = start + t if where == 0 else positions[t]
        block = position // size
        if position < 0:
            starts[t] = NOWHERE
            continue
        if blocks != 0:
            if block >= length:
                return position
            block = table[block]
        if block < 0 or block >= count:
            return position
        starts[t] = block * strides[0] + position % size * strides[1]
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
                    at = h * U(source_strides[0]) + (U(t) + j) * U(source_strides[1])
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
    positions: Tensor | None,
    table: Tensor | None,
    start: int,
    cos: Tensor | None,
    sin: Tensor | None,
    first: int,
    interleaved: bool,
) -> None:
    """x [H, n, D] into cache [blocks, block size, H, D], of any strides, at positions [n] or from `start` on; keys
    turned by cos and sin [n, R/2] where given. Raises IndexError, before anything is written, where a position lies
    outside."""
    x = x if x.stride(2) == 1 else x.contiguous()
    where, blocks = _whole(positions), _whole(table)
    cos, sin = (None if y is None else y.contiguous() for y in (cos, sin))
    wrong = _scatter(
        cache.data_ptr(), tuple(cache.shape[:2]), cache.stride(), x.data_ptr(), tuple(x.shape), x.stride()[:2], start,
        _address(where), _address(blocks), 0 if blocks is None else len(blocks), _address(cos), _address(sin), first,
        0 if cos is None else cos.shape[1], interleaved,
    )  # fmt: skip
    if wrong >= 0:
        raise IndexError(f"position {wrong} lies outside the {cache.shape[0]} blocks of {cache.shape[1]} tokens")


def _whole(x: Tensor | None) -> Tensor | None:
    return x if x is None or (x.dtype == torch.int64 and x.is_contiguous()) else x.to(torch.int64).contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
