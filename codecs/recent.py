"""The stage that keeps the most recent tokens aside."""

import numpy as np
import pydantic

from lmcache_blend.codecs.container import array
from lmcache_blend.codecs.stages import Plane, Stage, register_stage
from lmcache_blend.codecs.transforms import rows, to_f16
from lmcache_blend.errors import CorruptChunkError


@register_stage("recent")
class Recent(Stage):
    """Keeps the last tokens in float16 beside the stream and passes the others on: attention looks at them most."""

    tokens: int = pydantic.Field(default=128, ge=0)

    def encode(self, x: np.ndarray, plane: Plane) -> tuple[np.ndarray, bytes]:
        rest = max(0, x.shape[1] - self.tokens)
        return x[:, :rest], to_f16(x[:, rest:])

    def decode(self, y: np.ndarray, side: memoryview, plane: Plane) -> np.ndarray:
        # How many there are depends on what an earlier stage left, so the bytes say it.
        n = len(side) // (2 * plane.channels)
        if n > self.tokens:
            raise CorruptChunkError(f"{n} recent tokens are kept, more than {self.tokens}")
        return np.concatenate((rows(y, plane), array(side, "<f2", (plane.channels, n)).astype(np.float32)), 1)
