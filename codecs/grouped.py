"""Uniform quantisation between the smallest and the largest value of each group of neighbours, in packed integers."""

from typing import Literal

import numba as nb
import numpy as np
import pydantic

from lmcache_blend.codecs.container import array, join, split
from lmcache_blend.codecs.entropy import SIZE, checked_size
from lmcache_blend.codecs.quantise import finite
from lmcache_blend.codecs.stages import EMPTY, Plane, Stage, register_stage
from lmcache_blend.codecs.transforms import to_f16


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
    width = span(x.shape[1], group)
    grouped = _grouped(x, width)
    top = 2 * _half(bits) if symmetric else (1 << bits) - 1
    if symmetric:
        step = to_f16(np.abs(grouped).max(2) * np.float32(2 / top))
        steps = _values(step, grouped)
        zero, zeros = b"", -steps * (top // 2)
    else:
        low = grouped.min(2)
        zero, step = to_f16(low), to_f16((grouped.max(2) - low) / top)
        zeros, steps = _values(zero, grouped), _values(step, grouped)
    safe = np.where(steps > 0, steps, np.inf)
    q = np.clip(np.rint((grouped - zeros[:, :, None]) / safe[:, :, None]), 0, top).astype(np.uint8)
    return zero, step, _flat(q, x.shape[1])


def dequantise(q: np.ndarray, zero: np.ndarray, step: np.ndarray, group: int | None) -> np.ndarray:
    """q [R, N], zero and step [R, G] float32 -> [R, N] float32."""
    grouped = _grouped(q, span(q.shape[1], group))
    return _flat(grouped * step[:, :, None] + zero[:, :, None], q.shape[1])


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


def _grouped(x: np.ndarray, width: int) -> np.ndarray:
    """[R, N] -> [R, G, width], the last group filled up with its last value."""
    missing = -x.shape[1] % width
    return (np.pad(x, ((0, 0), (0, missing)), "edge") if missing else x).reshape(len(x), -(-x.shape[1] // width), width)


def _flat(grouped: np.ndarray, length: int) -> np.ndarray:
    return grouped.reshape(len(grouped), grouped.shape[1] * grouped.shape[2])[:, :length]


def _values(raw: bytes, grouped: np.ndarray) -> np.ndarray:
    return np.frombuffer(raw, "<f2").astype(np.float32).reshape(grouped.shape[:2])


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
