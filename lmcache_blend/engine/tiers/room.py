"""How much a shared remote store holds and may still take: counted by this process, counted anew from time to time."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence

from lmcache_blend.engine.tiers.base import Entry, Miss, Outcome, Usage

RECOUNT_S, FULL_RECOUNT_S = 60.0, 5.0
"""Others write and delete too: the count is taken anew after so long, and sooner where it says that all is full."""


class Room:
    """Admission by capacity, for stores that have no limit of their own. capacity_bytes None admits everything."""

    def __init__(self, capacity_bytes: int | None, entries: Callable[[], Iterable[Entry]]):
        self._capacity, self._entries = capacity_bytes, entries
        self._nbytes, self._chunks, self._counted = 0, 0, -1e9
        self._lock = threading.Lock()

    def usage(self) -> Usage:
        """With a capacity, which is asked about at every write, as this process counts; without, a count of all."""
        if self._capacity is None or self._age() > RECOUNT_S:
            self._count()
        with self._lock:
            return Usage(self._nbytes, self._chunks, self._capacity)

    def put(
        self,
        sizes: Sequence[int],
        store: Callable[[Sequence[int]], list[Outcome]],
        keys: Sequence[bytes],
        lookup: Callable[[Sequence[bytes]], list[Outcome]],
    ) -> list[Outcome]:
        """Store what there is room for; "full" or "too_large" for the rest. `store` takes indices, answers for all."""
        if self._capacity is None or not keys:
            return store(range(len(keys)))
        if self._age() > RECOUNT_S:
            self._count()
        held = {key: size for key, size in zip(keys, lookup(keys), strict=True) if isinstance(size, int)}
        refused: dict[int, Miss] = {}
        for i, (key, size) in enumerate(zip(keys, sizes, strict=True)):
            if size > self._capacity:
                refused[i] = Miss("too_large", f"{size} bytes, capacity {self._capacity}")
            elif self._admit(size - held.get(key, 0), key not in held):
                held[key] = size
            else:
                refused[i] = Miss("full", f"{size} bytes, capacity {self._capacity}")
        try:
            out = store([i for i in range(len(keys)) if i not in refused])
        except Exception:
            self._counted = -1e9
            raise
        self.freed([size for i, size in enumerate(sizes) if i not in refused and isinstance(out[i], Miss)])
        return [refused.get(i, outcome) for i, outcome in enumerate(out)]

    def freed(self, outcomes: Sequence[Outcome]) -> None:
        """Values of these sizes are gone; misses are left out."""
        sizes = [n for n in outcomes if isinstance(n, int)]
        with self._lock:
            self._nbytes -= sum(sizes)
            self._chunks -= len(sizes)

    def _admit(self, growth: int, new: bool) -> bool:
        assert self._capacity is not None
        for again in (True, False):
            with self._lock:
                if self._nbytes + growth <= self._capacity:
                    self._nbytes += growth
                    self._chunks += new
                    return True
            if again and self._age() > FULL_RECOUNT_S:
                self._count()
        return False

    def _age(self) -> float:
        return time.monotonic() - self._counted

    def _count(self) -> None:
        sizes = [entry.nbytes for entry in self._entries()]
        with self._lock:
            self._nbytes, self._chunks, self._counted = sum(sizes), len(sizes), time.monotonic()
