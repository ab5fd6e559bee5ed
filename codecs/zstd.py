"""zstd: bytes of equal significance together (the shuffle of Blosc), then Zstandard (RFC 8878)."""

from typing import Literal

import numpy as np
import pydantic
import torch
import zstandard

from lmcache_blend.codecs.base import codecs
from lmcache_blend.codecs.container import DTYPES
from lmcache_blend.codecs.lossless import ExactCodec
from lmcache_blend.errors import CorruptChunkError


@codecs.register("zstd")
class Zstd(ExactCodec):
    """Bit for bit, unless `dtype` casts first."""

    level: int = pydantic.Field(default=3, ge=1, le=22)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Float type that K and V are cast to before; null keeps their own. A tensor too large for float16 is not cast."""

    def pack_tensor(self, x: torch.Tensor) -> bytes | None:
        cast = x.to(DTYPES[self.dtype]) if self.dtype else x
        if (cast.isfinite() != x.isfinite()).any():
            return None
        planes = cast.flatten().view(torch.uint8).numpy().reshape(-1, cast.itemsize).T
        return zstandard.ZstdCompressor(level=self.level).compress(planes.tobytes())

    def unpack_tensor(self, data: memoryview, dtype: torch.dtype, shape: tuple[int, int, int]) -> torch.Tensor:
        stored = DTYPES[self.dtype] if self.dtype else dtype
        elements = int(np.prod(shape))
        wanted = elements * stored.itemsize
        try:
            # zstandard allocates what the frame claims, so the claim is read first.
            size = zstandard.get_frame_parameters(bytes(data[:32])).content_size
            if size != wanted:
                raise CorruptChunkError(f"a frame of {size} bytes is not the {wanted} of {stored} {list(shape)}")
            raw = zstandard.ZstdDecompressor().decompress(bytes(data), allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CorruptChunkError(f"a Zstandard frame is damaged: {error}") from None
        planes = np.frombuffer(raw, np.uint8).reshape(stored.itemsize, elements)
        return torch.from_numpy(planes.T.copy()).view(stored).reshape(shape).to(dtype)
