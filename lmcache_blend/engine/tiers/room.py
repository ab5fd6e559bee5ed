"""How much a shared remote store may still take: counted by this process, and counted anew from time to time."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence

from lmcache_blend.engine.tiers.base import Entry, Miss, Outcome

RECOUNT_S, FULL_RECOUNT_S = 60.0, 5.0
"""Others write and delete too: the count is taken anew after so long, and sooner where it says that all is full."""


class Room:
    """Admission by capacity, for stores that have no limit of their own. capacity_bytes None admits everything."""

    def __init__(self, capacity_bytes: int | None, entries: Callable[[], Iterable[Entry]]):
        self._capacity, self._entries = capacity_bytes, entries
        self._used, self._counted = 0, -1e9
        self._lock = threading.Lock()

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
        held = {k: n if isinstance(n, int) else 0 for k, n in zip(keys, lookup(keys), strict=True)}
        refused: dict[int, Miss] = {}
        for i, (key, size) in enumerate(zip(keys, sizes, strict=True)):
            if size > self._capacity:
                refused[i] = Miss("too_large", f"{size} bytes, capacity {self._capacity}")
            elif self._admit(size - held[key]):
                held[key] = size
            else:
                refused[i] = Miss("full", f"{size} bytes, capacity {self._capacity}")
        out = store([i for i in range(len(keys)) if i not in refused])
        for i, size in enumerate(sizes):
            if i not in refused and isinstance(out[i], Miss):
                self.freed(size)
        return [refused.get(i, outcome) for i, outcome in enumerate(out)]

    def freed(self, nbytes: int) -> None:
        with self._lock:
            self._used -= nbytes

    def _admit(self, growth: int) -> bool:
        assert self._capacity is not None
        for again in (True, False):
            with self._lock:
                if self._used + growth <= self._capacity:
                    self._used += growth
                    return True
            if again and self._age() > FULL_RECOUNT_S:
                self._count()
        return False

    def _age(self) -> float:
        return time.monotonic() - self._counted

    def _count(self) -> None:
        used = sum(entry.nbytes for entry in self._entries())
        with self._lock:
            self._used, self._counted = used, time.monotonic()
