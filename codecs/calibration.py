"""Calibration data: KV of a model on some text, and how much the output depends on it. Fits of codecs read this."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from lmcache_blend.codecs.container import Shape


@dataclass(frozen=True)
class FitTarget:
    """The model of a fit. embedding: [V, E] float32, its input embeddings, or None."""

    name: str
    fingerprint: str
    shapes: tuple[Shape, ...]
    embedding: np.ndarray | None = None


class Calibration(Protocol):
    """KV of n documents, keys before RoPE, without the first tokens of each (attention sinks)."""

    target: FitTarget
    texts: frozenset[str]
    """Digests of the documents."""
    lengths: Sequence[int]
    """Tokens of each document that are in the data."""
    ids: Sequence[Tensor]
    """Token ids of each whole document, sinks included."""

    def kv(self, layer: int) -> tuple[Tensor, Tensor]:
        """K [N, H Dk] and V [N, H' Dv] float32 of all documents, head by head; N is the sum of lengths."""
        ...

    def fisher(self, layer: int) -> tuple[Tensor, Tensor]:
        """E[g g^T] per head of the loss with labels drawn from the model: for K [H, Dk, Dk], for V [H', Dv, Dv]."""
        ...

    def energy(self, layer: int) -> Tensor:
        """[N] float32: squared gradient of the same loss by each token's KV, per head over its mean, summed."""
        ...
