"""Layer by layer: the next layers are read and decoded in the background while the model computes the present one.

Reads go layer by layer over all chunks of a prompt, so that the first layer of the last chunk does not wait for the
last layer of the first. Whoever needs a layer waits for that layer only. What was hidden behind computing is measured:
`LayerReads.seconds` from the first read to the last, `waited` by those who needed a layer.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor

from lmcache_blend.codecs import CodedChunk, PipelineCodec
from lmcache_blend.codecs.threads import one_thread
from lmcache_blend.engine import values
from lmcache_blend.engine.level import Level
from lmcache_blend.engine.reading import read
from lmcache_blend.engine.store import Stored
from lmcache_blend.engine.tiers.base import Miss, Outcome
from lmcache_blend.errors import ChunkLostError, CorruptChunkError
from lmcache_blend.types import KVChunk, Pair

if TYPE_CHECKING:
    from lmcache_blend.engine.engine import KVEngine

WHOLE = 1 << 20
"""Values up to so many bytes are read in one piece."""


class Arriving(Sequence[Pair]):
    """The layers of one chunk; indexing waits. shapes: per layer (H, Dk, H', Dv), known at once."""

    def __init__(self, reads: "LayerReads", key: bytes, head: values.Head, data: memoryview, slot: np.ndarray | None):
        self.key, self.head, self.data, self.slot, self.shapes = key, head, data, slot, head.meta.shapes
        self.layers: list[Pair | None] = [None] * len(self.shapes)
        self.lost: str | None = None
        self.coded: CodedChunk | None = None
        """The container, once it was opened."""
        self._reads = reads

    def __len__(self) -> int:
        return len(self.layers)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Pair, ...]: ...
    def __getitem__(self, index: int | slice) -> Pair | tuple[Pair, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return self.layers[index] or self._reads.wait(self, index)

    def __iter__(self) -> Iterator[Pair]:
        return (self[i] for i in range(len(self)))

    def has(self, index: int) -> bool:
        """Whether a layer is there."""
        return self.layers[index] is not None


class _Unread(Exception):
    """A part of a value did not come."""

    def __init__(self, miss: Miss):
        super().__init__(miss.detail or miss.cause)
        self.miss = miss


class LayerReads:
    """Chunks of one tier on their way. seconds: the transfer so far; waited: by those who needed a layer."""

    def __init__(self, engine: "KVEngine", level: Level):
        self.waited = 0.0
        self._engine, self._level = engine, level
        self._chunks: list[Arriving] = []
        self._left = 0
        self._began, self._ended = time.perf_counter(), 0.0
        self._news = threading.Condition()
        self._then: Callable[[int], None] | None = None

    def then(self, call: Callable[[int], None]) -> None:
        """Have `call` made with each layer that comes from now on, in the thread that brought it and decoded it, where
        its numbers are still in the core's cache. An error in it loses the chunks that are not complete."""
        with self._news:
            if self._left:
                self._then = call

    @property
    def seconds(self) -> float:
        return max(self._ended - self._began, 0.0)

    def start(self, keys: Sequence[bytes]) -> list[Stored | None]:
        """Read the heads, and have the layers read; None for what is not there."""
        out: list[Stored | None] = [None] * len(keys)
        rows, buffers, slots, level = [], [], [], self._level
        room, _ = self._engine.promotion(level)
        for i, size in enumerate(level.lookup(keys)):
            if isinstance(size, Miss):
                level.metrics.miss(level.cause(size))
                continue
            slots.append(room(keys[i], size))
            rows.append(i)
            buffers.append((self._engine.landing(size) if slots[-1] is None else slots[-1]).data)
        wanted = [keys[i] for i in rows]
        first = [b if len(b) <= WHOLE else b[: values.HEAD_GUESS] for b in buffers]
        done = level.get(wanted, first, [0] * len(rows))
        for i, data, got, slot, outcome in zip(rows, buffers, first, slots, done, strict=True):
            try:
                out[i] = self._open(keys[i], data, got, slot, outcome)
            except _Unread as error:
                level.missed(keys[i], error.miss)
            except CorruptChunkError as error:
                level.failed(keys[i], error)
        starts = sorted({start for chunk in self._chunks for start in _starts(chunk)})
        self._left = len(starts)
        for layer in starts:
            self._engine.workers.submit(self._bring_and_leave, layer, priority=layer)
        return out

    def _open(self, key: bytes, data: memoryview, got: memoryview, slot: np.ndarray | None, outcome: Outcome) -> Stored:
        if isinstance(outcome, Miss):
            raise _Unread(outcome)
        if (need := values.head_bytes(got)) > len(got):
            self._rest(key, data, len(got), need)
        head = values.parse(data[: max(need, len(got))], key, len(data))
        if head.first_bytes > max(need, len(got)):
            self._rest(key, data, max(need, len(got)), head.first_bytes)
        layers = Arriving(self, key, head, data, slot)
        self._chunks.append(layers)
        return Stored(KVChunk(head.tokens(data), layers, head.meta.exact_after), len(data), self)  # pyright: ignore

    def _rest(self, key: bytes, data: memoryview, start: int, end: int) -> None:
        if end > len(data):
            raise CorruptChunkError(f"{end} bytes of head in a value of {len(data)}")
        (outcome,) = self._level.get([key], [data[start:end]], [start])
        if isinstance(outcome, Miss):
            raise _Unread(outcome)

    def _bring_and_leave(self, layer: int) -> None:
        try:
            self._bring(layer)
        except Exception as error:  # whatever it is, nobody may wait for what does not come
            self._level.metrics.error(error)
            miss = Miss("error", f"{type(error).__name__}: {error}")  # no chunk is deleted for what may be another's
            for chunk in self._chunks:
                if chunk.lost is None and None in chunk.layers:
                    self._level.missed(chunk.key, miss)
                    self._lose(chunk, miss)
        finally:
            with self._news:
                self._left -= 1
                if not self._left:
                    # They know this object: memory must not wait for the cycle to be found.
                    self._chunks, self._then = [], None

    def _bring(self, layer: int) -> None:
        """Read and decode the groups that begin at a layer."""
        one_thread()  # there are as many workers as cores, and a product takes one each
        here = [(c, _starts(c).index(layer)) for c in self._chunks if c.lost is None and layer in _starts(c)]
        far = [(c, g) for c, g in here if len(c.data) > WHOLE]
        spans = [c.head.span(g) for c, g in far]
        parts = [c.data[start:end] for (c, _), (start, end) in zip(far, spans, strict=True)]
        outcomes = self._level.get([c.key for c, _ in far], parts, [start for start, _ in spans])
        failed = {id(c): o for (c, _), o in zip(far, outcomes, strict=True) if isinstance(o, Miss)}
        good = [(c, g) for c, g in here if id(c) not in failed]
        for chunk, _ in here:
            if id(chunk) in failed:
                self._level.missed(chunk.key, failed[id(chunk)])
                self._lose(chunk, failed[id(chunk)])
        end = layer
        for (chunk, _), pairs in zip(good, self._decode(good), strict=True):
            if isinstance(pairs, Exception):  # of whatever codec
                self._lose(chunk, self._level.failed(chunk.key, pairs))
                continue
            with self._news:
                chunk.layers[layer : layer + len(pairs)] = pairs
                self._ended = time.perf_counter()
                self._news.notify_all()
            end = max(end, layer + len(pairs))
            if None not in chunk.layers:
                self._complete(chunk)
        with self._news:
            then = self._then
        if then is not None:
            for at in range(layer, end):
                then(at)

    def _decode(self, here: Sequence[tuple[Arriving, int]]) -> list[list[Pair] | Exception]:
        """The layers of a group of each chunk, or why they cannot be had. Coded chunks share their decoder's work."""
        out: list[list[Pair] | Exception] = []
        together: dict[tuple[type[PipelineCodec], int], list[int]] = {}
        for i, (chunk, group) in enumerate(here):
            try:
                codec = self._level.coder(chunk.head)
                if isinstance(codec, PipelineCodec) and chunk.head.meta.codec is not None:
                    chunk.head.check(chunk.data, 1 + group)
                    if chunk.coded is None:
                        chunk.coded = codec.open(chunk.head.container(chunk.data))
                    together.setdefault((type(codec), group), []).append(i)
                    out.append([])
                else:
                    out.append(chunk.head.group(chunk.data, group, codec))
            except Exception as error:
                out.append(error)
        for (kind, group), rows in together.items():
            try:
                coded = [here[i][0].coded for i in rows]
                found = kind.decode_together(coded, group, self._engine.landing)  # pyright: ignore
            except Exception:  # whose fault it is comes out one by one
                found = [_alone(here[i][0], group) for i in rows]
            for i, pairs in zip(rows, found, strict=True):
                out[i] = pairs if isinstance(pairs, Exception) else _fitting(here[i][0].head, pairs, group)
        return out

    def _lose(self, chunk: Arriving, miss: Miss) -> None:
        with self._news:
            chunk.lost = miss.detail or miss.cause
            self._news.notify_all()

    def _complete(self, chunk: Arriving) -> None:
        self._level.metrics.hit()
        self._level.touch([chunk.key])
        whole = KVChunk(chunk.head.tokens(chunk.data), tuple(chunk.layers), chunk.head.meta.exact_after)  # pyright: ignore
        _, filled = self._engine.promotion(self._level)
        filled(chunk.key, whole, chunk.slot if chunk.head.meta.codec is None else None)

    def wait(self, chunk: Arriving, layer: int) -> Pair:
        """The layer, as soon as it is there. Raises ChunkLostError."""
        began = time.perf_counter()
        with self._news:
            self._news.wait_for(lambda: chunk.layers[layer] is not None or chunk.lost is not None)
        self.waited += time.perf_counter() - began
        pair = chunk.layers[layer]
        if pair is None:
            raise ChunkLostError(chunk.key, f"layer {layer} could not be loaded: {chunk.lost}")
        return pair


def _alone(chunk: Arriving, group: int) -> list[Pair] | Exception:
    assert chunk.coded is not None
    try:
        return chunk.coded.layers(group)
    except Exception as error:
        return error


def _fitting(head: values.Head, pairs: list[Pair], group: int) -> list[Pair] | Exception:
    try:
        head.fits(pairs, sum(head.meta.groups[:group]))
    except CorruptChunkError as error:
        return error
    return pairs


def _starts(chunk: Arriving) -> list[int]:
    """The first layer of each group."""
    at, out = 0, []
    for size in chunk.head.meta.groups:
        out.append(at)
        at += size
    return out


def load(engine: "KVEngine", keys: Sequence[bytes]) -> list[Stored | None]:
    """See KVEngine.load."""
    out: list[Stored | None] = [None] * len(keys)
    left: list[int] = []
    for i, key in enumerate(keys):
        waiting: Any = engine.writing.pending.get(key)
        if waiting is None:
            left.append(i)
        else:
            out[i] = Stored(waiting, waiting.nbytes)
    for level in engine.levels:
        if not left:
            break
        wanted = [keys[i] for i in left]
        if level.memory is None:
            found = LayerReads(engine, level).start(wanted)
        else:
            found = [None if chunk is None else Stored(chunk, n) for chunk, n in read(level, wanted)]
        for i, item in zip(left, found, strict=True):
            out[i] = item
        left = [i for i in left if out[i] is None]
    return out


class LayerWriter:
    """A chunk that is stored as its layers are computed; visible as a whole when the last one is there, or never.

    left: layers that are to come. Each `put` copies one layer, and blocks no longer than that.
    """

    def __init__(self, engine: "KVEngine", key: bytes, blank: values.Blank, cost: float):
        self._engine, self._key, self._blank, self._cost = engine, key, blank, cost
        self._slot = engine.writing.begin(blank, key)
        self.left = set(range(len(blank.meta.shapes)))
        self._waits = False
        if self._slot is not None:
            blank.begin(self._slot)

    @property
    def taken(self) -> bool:
        """Whether there is room; where not, `put` does nothing."""
        return self._slot is not None

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Copy a layer, K [H, T, Dk] and V [H', T, Dv]. Raises ConfigError for another shape or type."""
        if self._slot is None or layer not in self.left:
            return
        self._waits = self._blank.put(self._slot, layer, k, v) or self._waits
        self.left.discard(layer)
        if not self.left:
            if self._waits:
                torch.cuda.current_stream().synchronize()
            self._engine.writing.finish(self._key, self._slot, self._cost)
            self._slot = None
