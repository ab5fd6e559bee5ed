"""Rotation on CPU in float32: one pass of numba code instead of six passes of torch operators (7 times faster).

Tensors come flat, with the strides of their dims, and indices are unsigned: numba wraps those that may be negative
around, and the compiler makes no vector code of that.
"""

from collections.abc import Sequence

import numba as nb
import numpy as np
import torch
from torch import Tensor

U = np.uint64


@nb.njit(nogil=True, cache=True, boundscheck=False)
def turn_row(out, o, x, at, dim, cos, sin, angles, first, half, interleaved):
    """A token's out[o:][:dim] from x[at:][:dim], by cos and sin[angles:][:half]; what lies outside of
    first..first + 2 half is copied. Numbers are uint64."""
    for i in range(first):
        out[o + i] = x[at + i]
    for i in range(first + half + half, dim):
        out[o + i] = x[at + i]
    o += first
    at += first
    if interleaved:
        for i in range(half):
            j = i + i
            k = j + U(1)
            a, b, c, s = x[at + j], x[at + k], cos[angles + i], sin[angles + i]
            out[o + j] = a * c - b * s
            out[o + k] = b * c + a * s
    else:
        high, behind = o + half, at + half
        for i in range(half):
            a, b, c, s = x[at + i], x[behind + i], cos[angles + i], sin[angles + i]
            out[o + i] = a * c - b * s
            out[high + i] = b * c + a * s


@nb.njit(nogil=True, cache=True, boundscheck=False)
def _turn(out, out_strides, x, strides, shape, cos, sin, first, half, interleaved):
    heads, tokens, dim = U(shape[0]), U(shape[1]), U(shape[2])
    for t in range(tokens):  # outside: heads of a token lie near each other in what a codec gives
        for h in range(heads):
            o = h * U(out_strides[0]) + t * U(out_strides[1])
            at = h * U(strides[0]) + t * U(strides[1])
            turn_row(out, o, x, at, dim, cos, sin, t * U(half), U(first), U(half), interleaved)


def turn_f32(target: Tensor, source: Tensor, cos: Tensor, sin: Tensor, first: int, interleaved: bool) -> None:
    """target, source [H, n, D] float32; dims first..first+R turn by cos and sin [n, R/2], the others are copied."""
    source = source if source.stride(2) == 1 else source.contiguous()
    tables = [x.contiguous().flatten().numpy() for x in (cos, sin)]
    _turn(flat(target), target.stride()[:2], flat(source), source.stride()[:2], tuple(source.shape), *tables, first,
          cos.shape[1], interleaved)  # fmt: skip


def flat(x: Tensor) -> np.ndarray:
    """The memory from x's first number to its last, as one row."""
    return torch.as_strided(x.detach(), (span(x.shape, x.stride()),), (1,)).numpy()


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Numbers from the first to the last of a tensor.

    >>> span((2, 3), (4, 1))
    7
    """
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0
