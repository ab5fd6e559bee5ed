"""Stages from array to array: attention sinks kept aside, mean removal."""

import numpy as np
import pydantic

from lmcache_blend.codecs.container import array
from lmcache_blend.codecs.stages import NotCodable, Plane, Stage, register_stage
from lmcache_blend.errors import CorruptChunkError

F16_MAX = 65504.0


@register_stage("sinks")
class Sinks(Stage):
    """Keeps the first tokens in float16 beside the stream and passes the others on: attention sinks tolerate no
    error."""

    tokens: int = pydantic.Field(default=4, ge=0)

    def encode(self, x: np.ndarray, plane: Plane) -> tuple[np.ndarray, bytes]:
        n = min(self.tokens, x.shape[1])
        return x[:, n:], to_f16(x[:, :n])

    def decode(self, y: np.ndarray, side: memoryview, plane: Plane) -> np.ndarray:
        n = min(self.tokens, plane.tokens)
        head = array(side, "<f2", (plane.channels, n)).astype(np.float32)
        if y.shape[1] != plane.tokens - n:
            raise CorruptChunkError(f"{y.shape[1]} tokens behind {n} sinks of {plane.tokens}")
        out = np.empty((plane.tokens, plane.channels), np.float32)  # token by token, as the chunk wants it
        out[:n], out[n:] = head.T, rows(y, plane).T
        return out.T


@register_stage("mean")
class Mean(Stage):
    """Takes each channel's mean over the chunk away; float16 beside the stream."""

    def encode(self, x: np.ndarray, plane: Plane) -> tuple[np.ndarray, bytes]:
        side = to_f16(x.mean(1, dtype=np.float64) if x.shape[1] else np.zeros(len(x)))
        return x - np.frombuffer(side, "<f2").astype(np.float32)[:, None], side

    def decode(self, y: np.ndarray, side: memoryview, plane: Plane) -> np.ndarray:
        return rows(y, plane) + array(side, "<f2", (plane.channels,)).astype(np.float32)[:, None]


def rows(y: np.ndarray, plane: Plane) -> np.ndarray:
    """The matrix; raises CorruptChunkError unless it has a row per channel."""
    if len(y) != plane.channels:
        raise CorruptChunkError(f"{len(y)} rows for {plane.channels} channels")
    return y


def to_f16(x: np.ndarray) -> bytes:
    """float16 bytes; raises NotCodable where a value is too large for it."""
    if x.size and np.abs(x).max() > F16_MAX:
        raise NotCodable
    return x.astype("<f2").tobytes()
