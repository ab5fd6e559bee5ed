"""The quantiser of CacheGen as LMCache 0.5.6 ships it, bit for bit.

LMCache scales K [T, H D] and V [T, H' D'] of a layer token by token and rounds to an odd number of levels,

    M = bins // 2 - 1,   scale[t] = max_c |x[t, c]|,   q[t, c] = round(x[t, c] * (M / scale[t]) + M) in 0..2M,

in float32 whatever the type of x (torch_quant_vectorized), and decodes to ((q - M) / M) * scale (do_dequantize).
"""

import numba as nb
import numpy as np
import pydantic

from lmcache_blend.codecs.container import array
from lmcache_blend.codecs.quantise import finite
from lmcache_blend.codecs.stages import Plane, Stage, register_stage
from lmcache_blend.errors import CorruptChunkError

BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2
TILE = 32


@register_stage("token_absmax")
class TokenAbsmax(Stage):
    """One scale per token, the largest magnitude over all heads and channels of the plane; symbols 0..2M.

    A token whose scale is 0, or so small that M / scale overflows, is symbol 0 everywhere, as on LMCache's CPU path.
    """

    bins: int = pydantic.Field(default=16, ge=4, le=256)
    """Levels: 2 (bins // 2) - 1. LMCache itself holds symbols as int8, so beyond 128 bins only this codec works."""

    def encode(self, x: np.ndarray, plane: Plane) -> tuple[np.ndarray, bytes]:
        middle, scale = np.float32(self.bins // 2 - 1), absmax(x)
        with np.errstate(divide="ignore", over="ignore"):
            factor = middle / scale
        usable = np.isfinite(factor)
        q = x * np.where(usable, factor, np.float32(0))
        q += np.where(usable, middle, np.float32(0))
        return np.rint(q, out=q).astype(np.int16), to_scales(scale)

    def decode(self, y: np.ndarray, side: memoryview, plane: Plane) -> np.ndarray:
        middle, scale = np.float32(self.bins // 2 - 1), from_scales(side, y.shape[1])
        if y.size and not 0 <= y.min() <= y.max() <= 2 * middle:
            raise CorruptChunkError(f"symbols from {y.min()} to {y.max()} are outside 0 to {int(2 * middle)}")
        return _dequantise(np.ascontiguousarray(y), middle, scale).T


def absmax(x: np.ndarray) -> np.ndarray:
    """[C, T] -> [T], the largest magnitude of each column."""
    return np.abs(x).max(0, initial=0)


def to_scales(scale: np.ndarray) -> bytes:
    """[T] float32 to bytes that keep every bit, two a value where the values came from a 16-bit type."""
    with np.errstate(over="ignore"):
        half = scale.astype("<f2")
    if not (scale.view(np.uint32) & 0xFFFF).any():
        return bytes([BFLOAT16]) + (scale.view(np.uint32) >> 16).astype("<u2").tobytes()
    if (half == scale).all():
        return bytes([FLOAT16]) + half.tobytes()
    return bytes([FLOAT32]) + scale.astype("<f4").tobytes()


def from_scales(data: memoryview, count: int) -> np.ndarray:
    """`to_scales` undone; raises CorruptChunkError unless they are `count` finite values."""
    kind = data[0] if len(data) else -1
    if kind == BFLOAT16:
        return finite((array(data[1:], "<u2", (count,)).astype(np.uint32) << 16).view(np.float32))
    if kind not in (FLOAT16, FLOAT32):
        raise CorruptChunkError(f"scales of kind {kind} are unknown")
    return finite(array(data[1:], "<f2" if kind == FLOAT16 else "<f4", (count,)).astype(np.float32))


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _dequantise(q, middle, scale):
    """[C, T] symbols to [T, C] values, by tiles: with rows of 4 KiB, columns would fall on one set of the cache."""
    channels, tokens = q.shape
    out, tile = np.empty((tokens, channels), np.float32), np.empty((TILE, TILE), np.float32)
    for t0 in range(0, tokens, TILE):
        n = min(TILE, tokens - t0)
        for c0 in range(0, channels, TILE):
            m = min(TILE, channels - c0)
            for c in range(m):
                for t in range(n):
                    tile[c, t] = (np.float32(q[c0 + c, t0 + t]) - middle) / middle
            for t in range(n):
                for c in range(m):
                    out[t0 + t, c0 + c] = tile[c, t] * scale[t0 + t]
    return out
