"""Rotation on CPU in float32: one pass of numba code instead of six passes of torch operators.

Tensors come as addresses and strides: that spares a dozen calls of torch, which threads that load side by side would
wait for. Indices are unsigned: numba wraps those that may be negative around, and the compiler makes no vector code of
that.
"""

from typing import Any

import numba as nb
import numpy as np
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

U = np.uint64
MOST = 1 << 60
"""Length of an array of which only the address is known."""


def _pointer_to(kind: Any) -> Any:
    @intrinsic
    def pointer(typing, address):
        def emit(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), emit

    return pointer


float32_at, int64_at = _pointer_to(types.float32), _pointer_to(types.int64)


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
def _turn(target, target_strides, source, strides, shape, cosines, sines, first, half, interleaved):
    out, x = nb.carray(float32_at(target), (MOST,)), nb.carray(float32_at(source), (MOST,))
    cos, sin = nb.carray(float32_at(cosines), (MOST,)), nb.carray(float32_at(sines), (MOST,))
    heads, tokens, dim = U(shape[0]), U(shape[1]), U(shape[2])
    for t in range(tokens):  # outside: heads of a token lie near each other in what a codec gives
        for h in range(heads):
            o = h * U(target_strides[0]) + t * U(target_strides[1])
            at = h * U(strides[0]) + t * U(strides[1])
            turn_row(out, o, x, at, dim, cos, sin, t * U(half), U(first), U(half), interleaved)


def turn_f32(target: Tensor, source: Tensor, cos: Tensor, sin: Tensor, first: int, interleaved: bool) -> None:
    """target, source [H, n, D] float32; dims first..first+R turn by cos and sin [n, R/2], the others are copied."""
    source = source if source.stride(2) == 1 else source.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    _turn(
        target.data_ptr(), target.stride()[:2], source.data_ptr(), source.stride()[:2], tuple(source.shape),
        cos.data_ptr(), sin.data_ptr(), first, cos.shape[1], interleaved,
    )  # fmt: skip
