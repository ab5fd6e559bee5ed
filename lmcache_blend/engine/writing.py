"""The way down: copy out of the caller's memory, write to the tiers in the background, demote what is evicted."""

import concurrent.futures
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from lmcache_blend.engine import values
from lmcache_blend.engine.arena import Arena
from lmcache_blend.engine.config import EngineConfig
from lmcache_blend.engine.level import Level, Sink
from lmcache_blend.engine.reading import read
from lmcache_blend.engine.tiers.base import ABSENT, Miss, Outcome
from lmcache_blend.engine.workers import Workers
from lmcache_blend.types import KVChunk


class QueueFull(OSError):
    """A chunk was not taken: max_pending_bytes wait already. The name in the metric of errors."""


class NotDemoted(OSError):
    """A chunk was evicted though the tier below did not take it. The name in the metric of errors."""


class Waiting(NamedTuple):
    """A chunk on its way down."""

    key: bytes
    chunk: KVChunk
    cost: float


BATCH_BYTES = 16 << 20
"""Written by one task, about."""
NICE = 10
"""Of the threads that encode and write: a forward on the same cores goes first, and nobody waits for them."""


class Writing:
    """Writes of one engine. pending: chunks that are in no tier yet, and are served from here."""

    def __init__(self, levels: Sequence[Level], config: EngineConfig):
        self.levels, self.top, self.config = levels, levels[0], config
        self.pending: dict[bytes, KVChunk] = {}
        # One more than write, so that a batch is ready when the one before it is written. Of those that encode, which
        # takes threads of its own, two: whoever waits for the interpreter waits for all of them.
        self._queues = [
            Workers(2 if level.codec is not None else level.tier.threads + 1, f"kv-write-{level.name}", nice=NICE)
            for level in levels
        ]
        self._running: set[Future[None]] = set()
        self._arena: Arena | None = None
        self._relieving = threading.Lock()
        self._lock = threading.Lock()

    def store(
        self,
        keys: Sequence[bytes],
        chunks: Sequence[KVChunk],
        costs: Sequence[float],
        there: Sequence[bool],
        borrow: bool,
    ) -> list[bool]:
        """Copy the chunks that are not there and see to their writing; whether each was taken.

        borrow: the caller waits for the writing, so that its memory need not be copied first.
        """
        below = [i for i, level in enumerate(self.levels) if i and level.config.write == "through"]
        batches: dict[tuple[int, ...], list[Waiting]] = {}
        out = []
        for key, chunk, cost, known in zip(keys, chunks, costs, there, strict=True):
            if known or key in self.pending:
                out.append(True)
                continue
            slot, targets, mine = self._fill_top(key, chunk, cost), tuple(below), None
            if slot is None:
                mine, targets = chunk if borrow else self._stage(key, chunk), (0, *below)
            elif targets:
                mine = _view(key, slot)
            out.append(slot is not None or mine is not None)
            if mine is not None:
                batch = batches.setdefault(targets, [])
                batch.append(Waiting(key, mine, cost))
                if sum(w.chunk.nbytes for w in batch) >= BATCH_BYTES:
                    self._submit(targets, batches.pop(targets), new=True)
        for targets, batch in batches.items():
            self._submit(targets, batch, new=True)
        self._relieve()
        return out

    def _fill_top(self, key: bytes, chunk: KVChunk, cost: float) -> np.ndarray | None:
        """Copy a chunk into its slot of the first tier; None where that has no room at once, or codes its chunks."""
        if self.top.memory is None or self.top.codec is not None:
            return None
        blank = values.Blank.of(key, chunk)
        slot = self.slot(key, blank.nbytes)
        if slot is None:
            return None
        blank.fill(slot, chunk.layers)
        return slot if self.commit(key, slot, cost, dirty=len(self.levels) > 1) else None

    def _stage(self, key: bytes, chunk: KVChunk) -> KVChunk | None:
        """Copy a chunk into memory of our own, from which it is served until it is written; None where that is full."""
        blank = values.Blank.of(key, chunk)
        slot = self._staging().take(blank.nbytes)
        if slot is None:
            self.top.metrics.error(QueueFull())
            return None
        blank.fill(slot, chunk.layers)
        self.pending[key] = mine = _view(key, slot)
        return mine

    def begin(self, blank: values.Blank, key: bytes) -> np.ndarray | None:
        """Memory for a chunk that comes layer by layer; None where there is none."""
        in_place = self.top.memory is not None and self.top.codec is None
        slot = self.slot(key, blank.nbytes) if in_place else None
        return self._staging().take(blank.nbytes) if slot is None else slot

    def finish(self, key: bytes, slot: np.ndarray, cost: float) -> None:
        """Store what was filled layer by layer, as `store` does."""
        in_place = self.top.memory is not None and self.top.codec is None
        below = tuple(i for i, level in enumerate(self.levels) if i and level.config.write == "through")
        mine = _view(key, slot)
        if in_place and self.commit(key, slot, cost, dirty=len(self.levels) > 1):
            if below:
                self._submit(below, [Waiting(key, mine, cost)])
        else:
            self.pending[key] = mine
            self._submit((0, *below), [Waiting(key, mine, cost)])
        self._relieve()

    def _staging(self) -> Arena:
        """Memory for what waits; used again and again, because fresh pages cost more than copying into them."""
        with self._lock:
            if self._arena is None:
                self._arena = Arena(max(self.config.max_pending_bytes, 1), pin=False)
            return self._arena

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
            blank = values.Blank.of(key, chunk)
            slot = self.slot(key, blank.nbytes)
            if slot is not None:
                blank.fill(slot, chunk.layers)
                self.commit(key, slot, float(len(chunk)), dirty=False)
        else:
            self.top.put([key], [self.top.encode(key, chunk)], [float(len(chunk))], None)

    def write(self, i: int, batch: "Sequence[Waiting]", looked: bool = False) -> list[bool]:
        """Put chunks into level i, unless they are there; whether each is then. looked: none was a moment ago."""
        level = self.levels[i]
        found: list[Outcome] = [ABSENT] * len(batch) if looked else level.lookup([w.key for w in batch])
        absent, coded = [], []
        for j, outcome in enumerate(found):
            if isinstance(outcome, Miss):
                try:
                    coded.append(level.encode(*batch[j][:2]))
                except Exception as error:  # of whatever codec
                    level.metrics.error(error)
                else:
                    absent.append(j)
        new = [batch[j] for j in absent]
        if i + 1 < len(self.levels):
            level.dirty.update(w.key for w in new)
        done = level.put([w.key for w in new], coded, [w.cost for w in new], self._sink(i))
        for j, outcome in zip(absent, done, strict=True):
            found[j] = outcome
        for w, outcome in zip(batch, found, strict=True):
            for above in [level] if isinstance(outcome, Miss) else self.levels[:i]:
                above.dirty.discard(w.key)
        return [isinstance(outcome, int) for outcome in found]

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
                            self.write(i + 1, [Waiting(key, chunk, float(len(chunk)))])

    def depth(self) -> int:
        """Writes that wait or run."""
        return len(self._running)

    def close(self) -> None:
        for queue in self._queues:
            queue.close()

    def _submit(self, targets: Sequence[int], batch: "list[Waiting]", new: bool = False) -> None:
        """new: none of them is in the first tier."""
        left = [len(targets)]

        def work(i: int) -> None:
            try:
                self.write(i, batch, new and i == 0)
            finally:
                with self._lock:
                    left[0] -= 1
                if not left[0]:
                    for w in batch:
                        self.pending.pop(w.key, None)

        for i in targets:
            self._run(i, work, i)

    def _run(self, i: int, work: Callable[..., None], *arguments: int) -> None:
        with self._lock:
            future = self._queues[i].submit(work, *arguments)
            self._running.add(future)
        future.add_done_callback(self._done)

    def _done(self, future: "Future[None]") -> None:
        with self._lock:
            self._running.discard(future)

    def _sink(self, i: int) -> Sink:
        """Demotion: what leaves level i is written to the next one before.

        A chunk that is refused there is let go all the same: a tier that is down must not freeze the one above.
        """

        def demote(key: bytes) -> bool:
            for chunk, _ in read(self.levels[i], [key], leaving=True):
                if chunk is not None and not self.write(i + 1, [Waiting(key, chunk, float(len(chunk)))])[0]:
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

        self._run(0, work)


def _view(key: bytes, slot: np.ndarray) -> KVChunk:
    """The chunk in a slot that `Blank` filled."""
    return values.parse(slot.data, key, slot.size).chunk(slot.data, None)
