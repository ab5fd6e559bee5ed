"""Stages from array to symbols: uniform steps."""

import numpy as np
import pydantic

from lmcache_blend.codecs.container import array
from lmcache_blend.codecs.stages import NotCodable, Plane, Stage, register_stage
from lmcache_blend.errors import CorruptChunkError

LARGEST, F32_MAX = 32767, float(np.finfo(np.float32).max)


@register_stage("uniform")
class Uniform(Stage):
    """round(x / step), with one step for the plane: `step` times its root mean square, in the stream as float32."""

    step: float = pydantic.Field(default=0.25, gt=0, le=1e3)

    def encode(self, x: np.ndarray, plane: Plane) -> tuple[np.ndarray, bytes]:
        rms = np.sqrt(np.mean(np.square(x, dtype=np.float64))) if x.size else 0.0
        wide = max(self.step * rms, 1e-30)
        if wide > F32_MAX:
            raise NotCodable
        step = np.float32(wide)
        return to_symbols(x / step), step.astype("<f4").tobytes()

    def decode(self, y: np.ndarray, side: memoryview, plane: Plane) -> np.ndarray:
        return y * finite(array(side, "<f4", ()))


def to_symbols(x: np.ndarray) -> np.ndarray:
    """Nearest integers as int16; raises NotCodable where one does not fit."""
    if x.size and not np.abs(x).max() < LARGEST:
        raise NotCodable
    return np.rint(x).astype(np.int16)


def finite(x: np.ndarray) -> np.ndarray:
    """The array; raises CorruptChunkError where it holds NaN or infinities."""
    if not np.isfinite(x).all():
        raise CorruptChunkError("a scale is not finite")
    return x
