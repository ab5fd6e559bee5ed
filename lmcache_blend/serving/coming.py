"""A stored prefix on its way into vLLM's blocks."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lmcache_blend.engine.pipeline import Arriving, LayerReads
from lmcache_blend.rotary import Angles, RotaryTable
from lmcache_blend.serving.kv import PagedKV
from lmcache_blend.serving.messages import Load
from lmcache_blend.types import KVChunk, Pair


@dataclass
class Coming:
    """A prefix on its way into the blocks, layer by layer, while the forward computes. left: layers that are to come.

    parts: (chunk, its first token). good: tokens that are there when all layers are. reads: the transfers of chunks
    that are being read. A layer is placed by the thread that claims it; none can be claimed once this is closed.
    """

    load: Load
    kv: PagedKV
    parts: list[tuple[KVChunk, int]]
    good: int
    left: set[int]
    rotary: RotaryTable | None
    reads: list[LayerReads]
    spent_ms: float = 0.0

    def __post_init__(self) -> None:
        self._placing, self._news = 0, threading.Condition()

    def there(self, layer: int) -> bool:
        """Whether a layer of all parts has come."""
        return all(chunk.layers.has(layer) for chunk, _ in self.parts if isinstance(chunk.layers, Arriving))

    @contextmanager
    def claimed(self, layer: int) -> Iterator[bool]:
        """Whether the layer is the caller's to place, who does it within the `with` statement."""
        with self._news:
            mine = layer in self.left
            self.left.discard(layer)
            self._placing += mine
        try:
            yield mine
        finally:
            with self._news:
                self._placing -= mine
                self._news.notify_all()

    def place(self, layer: int) -> None:
        """Write a layer as soon as it has come, unless another thread does. Raises ChunkLostError."""
        load, first = self.load, self.load.keys[0][1]
        pairs = [chunk.layers[layer] for chunk, _ in self.parts]
        with torch.inference_mode(), self.claimed(layer) as mine:
            for at, k, v in joined(pairs) if mine else ():
                begin, end = max(first + at, load.start), min(first + at + k.shape[1], self.good)
                cut, where = slice(begin - first - at, end - first - at), slice(begin - load.start, end - load.start)
                angles = None if self.angles is None else self.angles[where]
                self.kv.place(layer, begin, k[:, cut], v[:, cut], angles)

    def close(self) -> None:
        """Wait for those who place a layer. After this nobody writes into the blocks."""
        with self._news:
            self.left.clear()
            self._news.wait_for(lambda: not self._placing)

    @cached_property
    def angles(self) -> Angles | None:
        return None if self.rotary is None else self.rotary.at(torch.arange(self.load.start, self.good))


def joined(pairs: Sequence[Pair]) -> list[tuple[int, Tensor, Tensor]]:
    """(first token, K, V) of pieces [H, T, D] one after another; one piece where they lie so, decoded together."""
    out: list[tuple[int, Tensor, Tensor]] = []
    at = 0
    for pair in pairs:
        k, v = (_extended(a, b) for a, b in zip(out[-1][1:], pair, strict=True)) if out else (None, None)
        if k is None or v is None:
            out.append((at, *pair))
        else:
            out[-1] = (out[-1][0], k, v)
        at += pair[0].shape[1]
    return out


def _extended(a: Tensor, b: Tensor) -> Tensor | None:
    """Both along T without a copy, where b lies behind a."""
    (heads, tokens, dim), (h, more, d) = a.shape, b.shape
    same = a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    behind = a.data_ptr() + tokens * a.stride(1) * a.element_size() == b.data_ptr()
    if not (same and behind) or (heads, dim, a.stride(), a.dtype) != (h, d, b.stride(), b.dtype):
        return None
    return a.as_strided((heads, tokens + more, dim), a.stride())
