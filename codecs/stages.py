"""Stages: the steps that a codec is made of, each an object with JSON parameters.

Three kinds, as in zarr: array -> array (transforms), array -> symbols (quantisers, int16), symbols -> bytes (entropy
coders). All work on one plane: a matrix [C, T], a row per channel (head by head) and a column per token.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lmcache_blend.codecs.container import Shape
from lmcache_blend.config import Config
from lmcache_blend.registry import Registry


class NotCodable(Exception):
    """The plane holds numbers that this stage cannot carry (NaN, infinities, a range too wide); it is stored as it
    is."""


@dataclass(frozen=True)
class Plane:
    """Where a matrix comes from. slot: "k", "v", or "kv" for both of all the layers, K before V in each.

    first: number of the first layer. shapes: of the layers in the plane. num_layers: L of the model. tokens: T.
    profile: what was fitted to the model, or None. token_ids: [T] int64.
    """

    slot: str
    first: int
    shapes: tuple[Shape, ...]
    num_layers: int
    tokens: int
    token_ids: np.ndarray
    profile: Any = None

    @property
    def channels(self) -> int:
        return sum(h * d * (self.slot != "v") + h2 * d2 * (self.slot != "k") for h, d, h2, d2 in self.shapes)


class Stage(Config):
    """One step. encode gives the result and the bytes that decode needs beside it."""

    def encode(self, x: np.ndarray, plane: Plane) -> tuple[np.ndarray, bytes]:
        """x: [C, T] float32 or int16, as the stage before left it. A symbols -> bytes stage returns an empty array.

        Raises NotCodable.
        """
        raise NotImplementedError

    def decode(self, y: np.ndarray, side: memoryview, plane: Plane) -> np.ndarray:
        """Undo `encode`. Raises CorruptChunkError on bytes that `encode` could not have written."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """JSON-able parameters with the "id" of the registry."""
        return {"id": next(name for name in stages if stages.get(name) is type(self)), **self.model_dump()}


stages: Registry[type[Stage]] = Registry("stage", "lmcache_blend.stages")
register_stage = stages.register
EMPTY = np.zeros((0, 0), np.int16)
