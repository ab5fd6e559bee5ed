"""Uniform quantisation between the smallest and the largest value of each group of neighbours, in packed integers."""

from typing import Literal

import numba as nb
import numpy as np
import pydantic

from lmcache_blend.codecs.container import array, join, split
from lmcache_blend.codecs.entropy import SIZE, checked_size
from lmcache_blend.codecs.quantise import finite
from lmcache_blend.codecs.stages import EMPTY, NotCodable, Plane, Stage, register_stage
from lmcache_blend.triton_kernels.quantise import cpu


@register_stage("grouped")
class Grouped(Stage):
    """Groups of neighbours share a float16 zero (their smallest value) and a float16 step; integers of `bits` bits."""

    bits: int = pydantic.Field(default=4, ge=2, le=8)
    axis: Literal["channel", "token"] = "channel"
    """channel: a group is `group` tokens of one channel; token: `group` channels of one token."""
    group: int | None = pydantic.Field(default=None, ge=1)
    """Values in a group, the last one of a row may have fewer; null takes the whole row."""
    symmetric: bool = False
    """Whether the zero is left out and the range is the largest magnitude in both directions."""

    def encode(self, x: np.ndarray, plane: Plane) -> tuple[np.ndarray, bytes]:
        lines = x if self.axis == "channel" else x.T
        zero, step, q = quantise(lines, self.group, self.bits, self.symmetric)
        return EMPTY, join([SIZE.pack(*x.shape), b"" if self.symmetric else zero, step, pack(q, self.bits)])

    def decode(self, y: np.ndarray, side: memoryview, plane: Plane) -> np.ndarray:
        size, zero, step, body = split(side, 4)
        shape = checked_size(size, plane)
        lines = shape if self.axis == "channel" else (shape[1], shape[0])
        groups = (lines[0], -(-lines[1] // span(lines[1], self.group)))
        q = unpack(body, self.bits, lines)
        steps = finite(array(step, "<f2", groups)).astype(np.float32)
        if self.symmetric:
            zeros = -steps * _half(self.bits)
        else:
            zeros = finite(array(zero, "<f2", groups)).astype(np.float32)
        x = dequantise(q, zeros, steps, self.group)
        return x if self.axis == "channel" else x.T


def span(length: int, group: int | None) -> int:
    """Values in a full group of a row of that length."""
    return max(1, min(length, group or length))


def quantise(x: np.ndarray, group: int | None, bits: int, symmetric: bool = False) -> tuple[bytes, bytes, np.ndarray]:
    """x [R, N] -> zero and step of each group, float16 [R, G], and q [R, N] uint8. Raises NotCodable beyond float16.

    The integers are taken against the rounded zero and step, so that rounding these costs next to nothing.
    """
    if not x.size:
        empty = np.empty((len(x), -(-x.shape[1] // span(x.shape[1], group))), np.float16)
        return b"" if symmetric else empty.tobytes(), empty.tobytes(), np.empty(x.shape, np.uint8)
    lines = np.ascontiguousarray(x, np.float32)
    q, step, zero = cpu.quantise(lines, span(x.shape[1], group), bits, symmetric)
    if not (np.isfinite(step).all() and np.isfinite(zero).all()):
        raise NotCodable
    return zero.astype("<f2").tobytes(), step.astype("<f2").tobytes(), q


def dequantise(q: np.ndarray, zero: np.ndarray, step: np.ndarray, group: int | None) -> np.ndarray:
    """q [R, N], zero and step [R, G] float32 -> [R, N] float32."""
    zero, step = np.ascontiguousarray(zero, np.float32), np.ascontiguousarray(step, np.float32)
    return cpu.dequantise(np.ascontiguousarray(q), zero, step, span(q.shape[1], group))


def pack(values: np.ndarray, bits: int) -> bytes:
    """Integers below 2^bits, bits <= 24, one after another, lowest bit first, zero bits up to a whole byte."""
    if bits == 8:
        return values.astype(np.uint8).tobytes()
    out = np.zeros(-(-values.size * bits // 8), np.uint8)
    _pack(np.ascontiguousarray(values, np.uint32).ravel(), bits, out)
    return out.tobytes()


def unpack(data: memoryview, bits: int, shape: tuple[int, int]) -> np.ndarray:
    """What `pack` packed, uint8 up to 8 bits and uint32 above; raises CorruptChunkError on a wrong number of bytes."""
    packed = array(data, "u1", (-(-shape[0] * shape[1] * bits // 8),))
    if bits == 8:
        return packed.reshape(shape)
    out = np.empty(shape, np.uint8 if bits < 8 else np.uint32)
    _unpack(packed, bits, out.ravel())
    return out


def _half(bits: int) -> int:
    """Largest magnitude of a symmetric integer of at least 2 bits."""
    return (1 << bits - 1) - 1


@nb.njit(nogil=True, cache=True)
def _pack(values, bits, out):
    held, count, at = np.uint64(0), np.uint64(0), 0
    for v in values:
        held |= np.uint64(v) << count
        count += np.uint64(bits)
        while count >= 8:
            out[at] = held & np.uint64(255)
            held >>= np.uint64(8)
            count -= np.uint64(8)
            at += 1
    if count:
        out[at] = held & np.uint64(255)


@nb.njit(nogil=True, cache=True)
def _unpack(packed, bits, out):
    held, count, at = np.uint64(0), np.uint64(0), 0
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    for i in range(len(out)):
        while count < bits:
            held |= np.uint64(packed[at]) << count
            count += np.uint64(8)
            at += 1
        out[i] = held & mask
        held >>= np.uint64(bits)
        count -= np.uint64(bits)
