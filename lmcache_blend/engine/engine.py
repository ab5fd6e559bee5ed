"""KVEngine: KV chunks by key over several tiers; what cannot be served is a miss, whatever happened to it."""

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from lmcache_blend.codecs.pipeline import fresh
from lmcache_blend.engine import values
from lmcache_blend.engine.aio import Async
from lmcache_blend.engine.arena import Arena
from lmcache_blend.engine.config import EngineConfig
from lmcache_blend.engine.events import EventLog
from lmcache_blend.engine.level import Level, Pins
from lmcache_blend.engine.operations import Operations
from lmcache_blend.engine.pipeline import LayerWriter, load
from lmcache_blend.engine.reading import MISS, Read, read
from lmcache_blend.engine.store import Stored
from lmcache_blend.engine.tiers.base import check_keys
from lmcache_blend.engine.workers import Workers
from lmcache_blend.engine.writing import Writing
from lmcache_blend.errors import ConfigError
from lmcache_blend.types import KVChunk

AIO_THREADS = 8
LANDING_BYTES = 1 << 30
"""Of memory that values are read into; taken from the system as it is used."""


class Found(NamedTuple):
    """What a lookup found.

    prefix: how many of the prefix chunks are there without a gap. tiers, segments: per key the nearest tier's name,
    None for a miss.
    """

    prefix: int
    tiers: list[str | None]
    segments: list[str | None]


class KVEngine(Operations):
    """Stores and serves KV chunks. Safe for several threads; close it, or use it in a `with` statement.

    config: EngineConfig, or its fields. Every operation has an asynchronous twin, `await engine.aio.retrieve(...)`.

    >>> import torch
    >>> from lmcache_blend.engine import Keyer
    >>> chunk = KVChunk(torch.arange(4), ((torch.ones(1, 4, 8), torch.ones(1, 4, 8)),))
    >>> with KVEngine(tiers=[{"tier": "cpu", "capacity_bytes": 1 << 20}]) as engine:
    ...     keys = Keyer("model").prefix_keys(chunk.tokens)
    ...     stored = engine.store(keys, [chunk])
    ...     engine.lookup(keys).prefix, engine.retrieve(keys)[0].tokens.tolist()
    (1, [0, 1, 2, 3])
    """

    def __init__(self, config: EngineConfig | None = None, **settings: Any):
        self.config = EngineConfig(**settings) if config is None else config
        self.events = EventLog()
        self.pins = Pins()
        self.levels = [Level(tier, self.pins, self.events) for tier in self.config.tiers]
        self.top = self.levels[0]
        self.writing = Writing(self.levels, self.config)
        self.workers = Workers(self.config.threads, "kv-load")
        self._aio = Workers(AIO_THREADS, "kv-aio")

    @cached_property
    def _landing(self) -> Arena | None:
        try:
            return Arena(LANDING_BYTES, "transparent", pin=False)
        except ConfigError:  # the system promises no memory before it is used
            return None

    def landing(self, nbytes: int) -> np.ndarray:
        """[nbytes] uint8 of undefined content to read or decode into, free again when the last view of it is gone.

        The same pages are used again and again, because fresh ones cost more than reading into them.
        """
        slot = None if self._landing is None else self._landing.take(nbytes)
        return fresh(nbytes) if slot is None else slot

    @property
    def aio(self) -> Async:
        """Every operation as a coroutine."""
        return Async(self, self._aio)

    # ------------------------------------------------------------------ store
    def store(
        self, keys: Sequence[bytes], chunks: Sequence[KVChunk], costs: Sequence[float] | None = None, wait: bool = False
    ) -> list[bool]:
        """Copy the chunks and write them in the background; whether each was taken. Chunks that are there stay.

        costs: what recomputing each would take, in seconds or any unit, by default its tokens; the eviction policy
        "cost" weighs it. wait: until all is written. A chunk is not taken where `max_pending_bytes` wait already.
        Raises ConfigError for chunks that cannot be stored.
        """
        check_keys(keys)
        there = [isinstance(found, int) for found in self.top.lookup(keys)]
        self.top.touch([key for key, found in zip(keys, there, strict=True) if found])
        costs = [float(len(chunk)) for chunk in chunks] if costs is None else costs
        out = self.writing.store(keys, chunks, costs, there, borrow=wait)
        if wait:
            self.flush()
        return out

    def store_layers(
        self,
        key: bytes,
        tokens: Tensor,
        shapes: Sequence[tuple[int, int, int, int]],
        dtypes: Sequence[tuple[torch.dtype, torch.dtype]],
        exact_after: bytes | None = None,
        cost: float | None = None,
    ) -> LayerWriter:
        """Begin to store a chunk whose layers come one by one: call `put(layer, k, v)` on what this returns.

        shapes, dtypes: per layer (H, Dk, H', Dv) and the types of K and V. Raises ConfigError.
        """
        check_keys([key])
        blank = values.Blank(key, tokens, shapes, dtypes, exact_after)
        return LayerWriter(self, key, blank, float(len(tokens)) if cost is None else cost)

    def flush(self) -> None:
        """Wait until everything that was stored so far is written, or has failed to be."""
        self.writing.flush()

    # ------------------------------------------------------------------ look up and retrieve
    def lookup(self, keys: Sequence[bytes], segments: Sequence[bytes] = ()) -> Found:
        """Where prefix chunks and segments are, in one call, without reading them."""
        both = [*keys, *segments]
        check_keys(both)
        pending, top = self.writing.pending, self.top.name
        where: list[str | None] = [top if key in pending else None for key in both] if pending else [None] * len(both)
        left = [i for i, name in enumerate(where) if name is None]
        for level in self.levels:
            if not left:
                break
            outcomes = level.lookup(both if len(left) == len(both) else [both[i] for i in left])
            name, absent = level.name, []
            for i, outcome in zip(left, outcomes, strict=True):
                if isinstance(outcome, int):
                    where[i] = name
                else:
                    absent.append(i)
            left = absent
        first = where[: len(keys)]
        return Found(first.index(None) if None in first else len(first), first, where[len(keys) :])

    def retrieve(self, keys: Sequence[bytes], into: Sequence[Any] | None = None) -> list[KVChunk | None]:
        """Whole chunks, checked; None for a miss of any cause. The tensors are not to be written to.

        Chunks in this process's memory are not copied: their tensors keep the memory for as long as they live.
        into: per key a buffer (uint8, at least as long as the value), of which the chunk's tensors become views. Where
        the answer is None a tier that timed out may still write to the buffer: give it up.
        """
        return [chunk for chunk, _ in self.fetch(keys, into)]

    def fetch(self, keys: Sequence[bytes], into: Sequence[Any] | None = None) -> list[Read]:
        """As retrieve, with the bytes of each value."""
        check_keys(keys)
        out, left = [MISS] * len(keys), []
        for i, key in enumerate(keys):
            waiting = self.writing.pending.get(key)
            if waiting is None:
                left.append(i)
            else:
                out[i] = waiting, waiting.nbytes
        for level in self.levels:
            if not left:
                break
            buffers = None if into is None else [into[i] for i in left]
            up = self.promotion(level, copy=into is not None)
            found = read(level, [keys[i] for i in left], buffers, *up, landing=self.landing)
            for i, item in zip(left, found, strict=True):
                out[i] = item
            left = [i for i in left if out[i][0] is None]
        return out

    def promotion(self, level: Level, copy: bool = False) -> tuple[Any, Any]:
        """What `read` needs to bring hits of a level into the first tier: raw values are read into their place there.

        copy: the chunks lie in memory of the caller's.
        """

        def filled(key: bytes, chunk: KVChunk, slot: np.ndarray | None) -> None:
            if slot is not None:
                self.writing.commit(key, slot, float(len(chunk)), dirty=False)
            elif copy:
                self.writing.copy_up(key, chunk)
            else:
                self.workers.submit(self.writing.copy_up, key, chunk, priority=math.inf)

        if level is self.top or not level.config.promote:
            return lambda key, nbytes: None, lambda key, chunk, slot: None
        in_place = level.codec is None and self.top.codec is None
        return (self.writing.slot if in_place else lambda key, nbytes: None), filled

    def load(self, keys: Sequence[bytes]) -> list[Stored | None]:
        """Chunks whose layers come one by one: indexing `chunk.layers` waits for that layer. None for a miss.

        A layer that fails to come raises ChunkLostError where it is asked for.
        """
        check_keys(keys)
        return load(self, keys)

    def prefetch(self, keys: Sequence[bytes]) -> "Future[list[bool]]":
        """Bring chunks into the first tier, in the background; whether each is there."""
        check_keys(keys)
        return self.workers.submit(lambda: [chunk is not None for chunk, _ in self.fetch(keys)], priority=1e6)

    # ------------------------------------------------------------------ pins
    def pin(self, keys: Sequence[bytes], seconds: float = math.inf) -> list[bool]:
        """Keep chunks in every tier that holds them, for that time; whether each was there. The longer pin holds."""
        check_keys(keys)
        if any(key in self.writing.pending for key in keys):
            self.flush()
        # Marked first and looked up then: what is there now was not chosen as a victim before the mark.
        new = set(self.pins.add(keys, seconds))
        there = [False] * len(keys)
        for level in self.levels:
            for i, outcome in enumerate(level.pin(keys, time.time() + seconds)):
                there[i] = there[i] or isinstance(outcome, int)
        for key, found in zip(keys, there, strict=True):
            if not found and key in new:
                self.pins.drop(key)
        self.events.publish("pinned", "", [key for key, found in zip(keys, there, strict=True) if found])
        return there

    def unpin(self, keys: Sequence[bytes]) -> list[bool]:
        """End pins, in a shared tier those of all engines; whether each key had one."""
        check_keys(keys)
        out = [self.pins.drop(key) for key in keys]
        for level in self.levels:
            for i, outcome in enumerate(level.unpin(keys)):
                out[i] = out[i] or isinstance(outcome, int)
        self.events.publish("unpinned", "", [key for key, held in zip(keys, out, strict=True) if held])
        return out

    # ------------------------------------------------------------------ as the Blender's store
    def get(self, key: bytes) -> Stored | None:
        """As `load`, of one chunk."""
        return self.load([key])[0]

    def put(self, key: bytes, chunk: KVChunk) -> None:
        """As `store`, of one chunk."""
        self.store([key], [chunk])

    def __contains__(self, key: bytes) -> bool:
        return self.lookup([key]).prefix == 1

    # ------------------------------------------------------------------ end
    def close(self) -> None:
        """Write what is not written yet, and release everything."""
        self.writing.flush(down=True)
        self.writing.close()
        self.workers.close()
        self._aio.close()
        for level in self.levels:
            level.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
