"""Rotation by a random Hadamard matrix, uniform steps, entropy coding: a TurboQuant-like codec without calibration.

TurboQuant (Zandieh et al., arXiv 2504.19874, section 3.1) rotates each vector at random, so that all coordinates look
alike, and quantises them one by one with a codebook for their common distribution. Here the rotation is signs and a
Hadamard matrix, and uniform steps with rANS behind them stand for the codebook, which costs fewer bits at equal error.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pydantic

from lmcache_blend.codecs.base import codecs
from lmcache_blend.codecs.entropy import Rans
from lmcache_blend.codecs.pipeline import PipelineCodec, members
from lmcache_blend.codecs.quantise import Uniform
from lmcache_blend.codecs.stages import NotCodable, Plane, Stage, register_stage
from lmcache_blend.codecs.transforms import Mean, Sinks, rows
from lmcache_blend.errors import CorruptChunkError

LARGEST_DIM = 1024
"""A rotation is a D x D matrix in memory: a chunk of few bytes must not ask for a large one."""


@register_stage("hadamard")
class HadamardStage(Stage):
    """Rotates the D channels of each head by `rotation(D, seed)`."""

    seed: int = pydantic.Field(default=0, ge=0)

    def encode(self, x: np.ndarray, plane: Plane) -> tuple[np.ndarray, bytes]:
        if largest_dim(plane) > LARGEST_DIM:
            raise NotCodable
        return self._rotate(x, plane, inverse=False), b""

    def decode(self, y: np.ndarray, side: memoryview, plane: Plane) -> np.ndarray:
        if len(side):
            raise CorruptChunkError(f"{len(side)} bytes are beside a rotation, which needs none")
        if largest_dim(plane) > LARGEST_DIM:
            raise CorruptChunkError(f"heads of {largest_dim(plane)} channels are not rotated, only up to {LARGEST_DIM}")
        return self._rotate(rows(y, plane), plane, inverse=True)

    def _rotate(self, x: np.ndarray, plane: Plane, inverse: bool) -> np.ndarray:
        out, at = np.empty_like(x), 0
        for layer, slot in members(plane):
            h, d = plane.shapes[layer - plane.first][2 * slot : 2 * slot + 2]
            matrix = rotation(d, self.seed)
            part = x[at : at + h * d].reshape(h, d, x.shape[1])
            out[at : at + h * d] = ((matrix.T if inverse else matrix) @ part).reshape(h * d, x.shape[1])
            at += h * d
        return out


@codecs.register("hadamard")
class Hadamard(PipelineCodec):
    """Sinks in float16; the others, less their mean, rotated per head and coded in steps of `step` times the plane's
    root mean square."""

    step: float = pydantic.Field(default=0.35, gt=0, le=1e3)
    """About 2.05 - log2(step) bits per element: .35 gives 3.6."""
    sinks: int = pydantic.Field(default=4, ge=0)
    """First tokens kept in float16."""

    def stages(self, plane: Plane) -> Sequence[Stage]:
        # Key channels far from zero (Qwen2.5) would set the step of all; the published method has no such remedy.
        return (Sinks(tokens=self.sinks), Mean(), HadamardStage(), Uniform(step=self.step), Rans())


def largest_dim(plane: Plane) -> int:
    """Largest D in the plane."""
    return max(plane.shapes[layer - plane.first][2 * slot + 1] for layer, slot in members(plane))


@lru_cache(maxsize=64)
def rotation(size: int, seed: int) -> np.ndarray:
    """[D, D] float32, orthonormal: a Hadamard matrix after random signs.

    A D that is no power of two, m * 2^k with m odd, takes the Kronecker product of an m-point DCT and a Hadamard matrix
    of 2^k, so that every channel still reaches every coordinate.
    """
    power = size & -size
    odd = size // power
    at = np.arange(odd)
    matrix = np.cos(np.pi / odd * np.outer(at, at + 0.5)) * np.sqrt(np.where(at == 0, 1, 2) / odd)[:, None]
    while len(matrix) < size:
        matrix = np.kron(matrix, np.array([[1, 1], [1, -1]]) / np.sqrt(2))
    # The bit generator's raw output is the same in every release of numpy; what Generator makes of it is not.
    signs = 1.0 - 2.0 * (np.random.PCG64(seed).random_raw(size) & np.uint64(1))
    return (matrix * signs).astype(np.float32)
