"""The way down: copy out of the caller's memory, write to the tiers in the background, demote what is evicted."""

import concurrent.futures
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from lmcache_blend.engine import values
from lmcache_blend.engine.config import EngineConfig
from lmcache_blend.engine.level import Level, Sink
from lmcache_blend.engine.reading import read
from lmcache_blend.engine.tiers.base import Miss
from lmcache_blend.engine.workers import Workers
from lmcache_blend.types import KVChunk


class QueueFull(OSError):
    """A chunk was not taken: max_pending_bytes wait already. The name in the metric of errors."""


class NotDemoted(OSError):
    """A chunk was evicted though the tier below did not take it. The name in the metric of errors."""


class Writing:
    """Writes of one engine. pending: chunks that are in no tier yet, and are served from here."""

    def __init__(self, levels: Sequence[Level], config: EngineConfig):
        self.levels, self.top, self.config = levels, levels[0], config
        self.pending: dict[bytes, KVChunk] = {}
        self._queues = [Workers(level.tier.threads, f"kv-write-{level.name}") for level in levels]
        self._running: dict[Future[None], int] = {}
        self._relieving = threading.Lock()
        self._lock = threading.Lock()

    def take(self, key: bytes, chunk: KVChunk, cost: float) -> bool:
        """Copy a chunk and see to its writing; whether it was taken."""
        below = [i for i, level in enumerate(self.levels) if i and level.config.write == "through"]
        if self.top.memory is not None and self.top.codec is None:
            blank = values.Blank(key, chunk)
            slot = self.slot(key, blank.nbytes)
            if slot is not None:
                blank.fill(slot)
                if self.commit(key, slot, cost, dirty=len(self.levels) > 1):
                    if below:
                        data = memoryview(slot)  # pyright: ignore[reportArgumentType]
                        mine = values.parse(data, key, blank.nbytes).chunk(data, None)
                        self._submit(below, key, mine, cost)
                    self._relieve()
                    return True
        with self._lock:
            if sum(self._running.values()) + chunk.nbytes > self.config.max_pending_bytes:
                self.top.metrics.error(QueueFull())
                return False
        layers = tuple((k.detach().to("cpu", copy=True), v.detach().to("cpu", copy=True)) for k, v in chunk.layers)
        mine = replace(chunk, tokens=chunk.tokens.clone(), layers=layers)
        self.pending[key] = mine
        self._submit([0, *below], key, mine, cost)
        return True

    def slot(self, key: bytes, nbytes: int) -> np.ndarray | None:
        """Room in the first tier, at the expense of chunks that are safe elsewhere; None where there is none."""
        if self.top.memory is None or not self.top.make_room(key, nbytes, None):
            return None
        for _ in range(8):
            slot = self.top.memory.reserve(nbytes)
            if not isinstance(slot, Miss):
                return slot
            # Room in fragments, or held by readers of what was evicted.
            if slot.cause != "full" or not self.top.evict(nbytes, lambda key: True, None):
                return None
        return None

    def commit(self, key: bytes, slot: np.ndarray, cost: float, dirty: bool) -> bool:
        """Make a filled slot a chunk of the first tier. dirty: no tier below holds it."""
        assert self.top.memory is not None
        if dirty:
            self.top.dirty.add(key)
        done = self.top.memory.commit(key, slot)
        if isinstance(done, Miss):
            self.top.dirty.discard(key)
            return False
        self.top.added(key, done, cost)
        return True

    def copy_up(self, key: bytes, chunk: KVChunk) -> None:
        """Promote a chunk that a tier below holds."""
        if isinstance(self.top.lookup([key])[0], int):
            return
        if self.top.memory is not None and self.top.codec is None:
            blank = values.Blank(key, chunk)
            slot = self.slot(key, blank.nbytes)
            if slot is not None:
                blank.fill(slot)
                self.commit(key, slot, float(len(chunk)), dirty=False)
        else:
            self.top.put([key], [self.top.encode(key, chunk)], [float(len(chunk))], None)

    def write(self, i: int, key: bytes, chunk: KVChunk, cost: float) -> bool:
        """Put a chunk into level i, unless it is there; whether it is then."""
        level = self.levels[i]
        (found,) = level.lookup([key])
        if not isinstance(found, int):
            if i + 1 < len(self.levels):
                level.dirty.add(key)
            (found,) = level.put([key], [level.encode(key, chunk)], [cost], self._sink(i))
        if isinstance(found, Miss):
            level.dirty.discard(key)
            return False
        for above in self.levels[:i]:
            above.dirty.discard(key)
        return True

    def flush(self, down: bool = False) -> None:
        """Wait until what was stored so far is written or has failed. down: also what is written back only later."""
        with self._lock:
            waiting = list(self._running)
        concurrent.futures.wait(waiting)
        if down:
            for i, level in enumerate(self.levels[:-1]):
                for key in list(level.dirty):
                    for chunk, _ in read(level, [key]):
                        if chunk is not None:
                            self.write(i + 1, key, chunk, float(len(chunk)))

    def depth(self) -> int:
        """Writes that wait or run."""
        return len(self._running)

    def close(self) -> None:
        for queue in self._queues:
            queue.close()

    def _submit(self, targets: Sequence[int], key: bytes, chunk: KVChunk, cost: float) -> None:
        left = [len(targets)]

        def work(i: int) -> None:
            try:
                self.write(i, key, chunk, cost)
            finally:
                with self._lock:
                    left[0] -= 1
                    if not left[0]:
                        self.pending.pop(key, None)

        for i in targets:
            self._run(i, chunk.nbytes, work, i)

    def _run(self, i: int, nbytes: int, work, *arguments: int) -> None:
        with self._lock:
            future = self._queues[i].submit(work, *arguments)
            self._running[future] = nbytes
        future.add_done_callback(self._done)

    def _done(self, future: "Future[None]") -> None:
        with self._lock:
            self._running.pop(future, None)

    def _sink(self, i: int) -> Sink:
        """Demotion: what leaves level i is written to the next one before.

        A chunk that is refused there is let go all the same: a tier that is down must not freeze the one above.
        """

        def demote(key: bytes) -> bool:
            for chunk, _ in read(self.levels[i], [key], leaving=True):
                if chunk is not None and not self.write(i + 1, key, chunk, float(len(chunk))):
                    self.levels[i].metrics.error(NotDemoted())
            return True

        return demote if i + 1 < len(self.levels) else None

    def _relieve(self) -> None:
        """Keep the first tier below its high-water mark, so that the next store finds room at once."""
        capacity = self.top.tier.capacity_bytes
        if capacity is None or len(self.levels) == 1:
            return
        limit = int(self.config.high_water * capacity)
        if self.top.tier.usage().nbytes <= limit or not self._relieving.acquire(blocking=False):
            return

        def work() -> None:
            try:
                while (over := self.top.tier.usage().nbytes - limit) > 0:
                    if not self.top.evict(over, lambda key: True, self._sink(0)):
                        return
            finally:
                self._relieving.release()

        self._run(0, 0, work)
