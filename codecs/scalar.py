"""Scalar formats without a transform or an entropy coder: fp8, int8, int4, one scale per channel or per token.

Keys are scaled per channel and values per token unless `axis` says otherwise: key outliers stay in their channels
(KIVI, arXiv 2402.02750, section 3).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch

from lmcache_blend.codecs.base import codecs
from lmcache_blend.codecs.container import array, join, split
from lmcache_blend.codecs.entropy import SIZE, checked_size
from lmcache_blend.codecs.grouped import Grouped
from lmcache_blend.codecs.pipeline import PipelineCodec
from lmcache_blend.codecs.quantise import finite
from lmcache_blend.codecs.stages import EMPTY, Plane, Stage, register_stage
from lmcache_blend.codecs.transforms import to_f16

FORMATS = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}


@register_stage("fp8")
class Fp8Stage(Stage):
    """x * largest number of the format / largest magnitude, as 8-bit floats; the magnitudes as float16 beside them."""

    format: Literal["e4m3", "e5m2"] = "e4m3"
    axis: Literal["channel", "token"] = "channel"

    def encode(self, x: np.ndarray, plane: Plane) -> tuple[np.ndarray, bytes]:
        dtype, top = FORMATS[self.format]
        along = 1 if self.axis == "channel" else 0
        side = to_f16(np.abs(x).max(along, initial=0))
        peak = np.expand_dims(np.frombuffer(side, "<f2").astype(np.float32), along)
        scaled = np.clip(x * (top / np.where(peak > 0, peak, np.inf)), -top, top)
        codes = torch.from_numpy(np.ascontiguousarray(scaled, np.float32)).to(dtype).view(torch.uint8)
        return EMPTY, join([SIZE.pack(*x.shape), side, codes.numpy().tobytes()])

    def decode(self, y: np.ndarray, side: memoryview, plane: Plane) -> np.ndarray:
        size, peaks, codes = split(side, 3)
        shape = checked_size(size, plane)
        along = 1 if self.axis == "channel" else 0
        peak = finite(array(peaks, "<f2", (shape[1 - along],))).astype(np.float32)
        x = finite(_numbers(self.format)[array(codes, "u1", shape)])
        return x * np.expand_dims(peak / FORMATS[self.format][1], along)


class _Scaled(PipelineCodec):
    axis: Literal["channel", "token"] | None = None
    """What has a scale of its own; null: every channel of K, every token of V."""

    def _axis(self, plane: Plane) -> Literal["channel", "token"]:
        return self.axis or ("channel" if plane.slot == "k" else "token")


@codecs.register("fp8")
class Fp8(_Scaled):
    """8-bit floats: e4m3 (3 bits of mantissa, largest 448) or e5m2 (2 bits, 57344)."""

    format: Literal["e4m3", "e5m2"] = "e4m3"

    def stages(self, plane: Plane) -> Sequence[Stage]:
        return (Fp8Stage(format=self.format, axis=self._axis(plane)),)


class _Integer(_Scaled):
    bits: ClassVar[int]
    symmetric: bool = False
    """Whether integers stand for -largest to +largest magnitude instead of the smallest to the largest value."""

    def stages(self, plane: Plane) -> Sequence[Stage]:
        return (Grouped(bits=self.bits, axis=self._axis(plane), symmetric=self.symmetric),)


@codecs.register("int8")
class Int8(_Integer):
    """Uniform steps, a byte per element."""

    bits: ClassVar[int] = 8


@codecs.register("int4")
class Int4(_Integer):
    """Uniform steps, two elements per byte."""

    bits: ClassVar[int] = 4


@lru_cache
def _numbers(name: str) -> np.ndarray:
    """[256] float32: what each byte of the format stands for."""
    return torch.arange(256, dtype=torch.uint8).view(FORMATS[name][0]).float().numpy()
