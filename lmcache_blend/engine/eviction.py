"""Which chunk goes when a tier is full. A policy sees what comes, what is used and what leaves, and names a victim.

Policies are not thread-safe; the engine calls them under its lock. `skip` keeps pinned chunks where they are.
"""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Protocol

from lmcache_blend.registry import Registry

Skip = Callable[[bytes], bool]


class EvictionPolicy(Protocol):
    """The order in which the chunks of one tier leave it. capacity: in bytes."""

    def add(self, key: bytes, nbytes: int, cost: float) -> None:
        """A chunk came in, or came again. cost: seconds (or any unit) that recomputing it takes."""
        ...

    def touch(self, key: bytes) -> None:
        """A chunk was used."""
        ...

    def remove(self, key: bytes) -> None:
        """A chunk left, for whatever reason; unknown ones are ignored."""
        ...

    def victim(self, skip: Skip) -> bytes | None:
        """The chunk that goes next among those not skipped; it stays known until `remove`."""
        ...


policies: Registry[Callable[[int], EvictionPolicy]] = Registry("eviction policy", "lmcache_blend.eviction")
register_eviction = policies.register


def _first(keys: Iterable[bytes], skip: Skip) -> bytes | None:
    return next((key for key in keys if not skip(key)), None)


@policies.register("fifo")
class Fifo:
    """First in, first out."""

    def __init__(self, capacity: int):
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def add(self, key: bytes, nbytes: int, cost: float) -> None:
        self._order.setdefault(key)

    def touch(self, key: bytes) -> None:
        pass

    def remove(self, key: bytes) -> None:
        self._order.pop(key, None)

    def victim(self, skip: Skip) -> bytes | None:
        return _first(self._order, skip)


@policies.register("lru")
class Lru(Fifo):
    """Least recently used."""

    def add(self, key: bytes, nbytes: int, cost: float) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def touch(self, key: bytes) -> None:
        if key in self._order:
            self._order.move_to_end(key)


class _Ranked:
    """Lowest rank first; of equal ones the oldest. Old heap entries stay until they come up."""

    def __init__(self) -> None:
        self._rank: dict[bytes, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, bytes]] = []
        self._turn = 0

    def set(self, key: bytes, rank: float) -> None:
        self._turn += 1
        self._rank[key] = rank, self._turn
        heapq.heappush(self._heap, (rank, self._turn, key))
        if len(self._heap) > 4 * len(self._rank) + 64:
            self._heap = [(*place, key) for key, place in self._rank.items()]
            heapq.heapify(self._heap)

    def remove(self, key: bytes) -> None:
        self._rank.pop(key, None)

    def first(self, skip: Skip) -> tuple[bytes, float] | None:
        held, found = [], None
        while self._heap and found is None:
            rank, turn, key = self._heap[0]
            if self._rank.get(key) != (rank, turn):
                heapq.heappop(self._heap)
            elif skip(key):
                held.append(heapq.heappop(self._heap))
            else:
                found = key, rank
        for entry in held:
            heapq.heappush(self._heap, entry)
        return found


@policies.register("lfu")
class Lfu:
    """Least frequently used; of those the least recently used."""

    def __init__(self, capacity: int):
        self._uses: Counter[bytes] = Counter()
        self._ranked = _Ranked()

    def add(self, key: bytes, nbytes: int, cost: float) -> None:
        self._uses[key] += 1
        self._ranked.set(key, self._uses[key])

    def touch(self, key: bytes) -> None:
        if key in self._uses:
            self.add(key, 0, 0.0)

    def remove(self, key: bytes) -> None:
        self._uses.pop(key, None)
        self._ranked.remove(key)

    def victim(self, skip: Skip) -> bytes | None:
        found = self._ranked.first(skip)
        return None if found is None else found[0]


@policies.register("cost")
class CostAware:
    """Least recompute time saved per byte: GreedyDual-Size with frequency (Cherkasova, HP Labs 1998).

    rank = clock + uses * cost / bytes; the clock follows the rank of what was evicted, so that old merit fades.
    """

    def __init__(self, capacity: int):
        self._items: dict[bytes, tuple[int, float]] = {}
        self._ranked = _Ranked()
        self._clock = 0.0
        self._candidate: tuple[bytes, float] | None = None

    def add(self, key: bytes, nbytes: int, cost: float) -> None:
        uses = self._items.get(key, (0, 0.0))[0] + 1
        self._items[key] = uses, cost / max(nbytes, 1)
        self._ranked.set(key, self._clock + uses * self._items[key][1])

    def touch(self, key: bytes) -> None:
        if key in self._items:
            uses, worth = self._items[key]
            self._items[key] = uses + 1, worth
            self._ranked.set(key, self._clock + (uses + 1) * worth)

    def remove(self, key: bytes) -> None:
        if self._candidate is not None and self._candidate[0] == key:
            self._clock = max(self._clock, self._candidate[1])
        self._items.pop(key, None)
        self._ranked.remove(key)

    def victim(self, skip: Skip) -> bytes | None:
        self._candidate = self._ranked.first(skip)
        return None if self._candidate is None else self._candidate[0]


@policies.register("s3fifo")
class S3Fifo:
    """Three FIFO queues (Yang et al., SOSP 2023): most chunks are used once and leave by a small one of a tenth.

    What comes again after it left the small queue (the ghost queue remembers) goes to the main one at once.
    """

    SMALL, MOST_USES = 0.1, 3

    def __init__(self, capacity: int):
        self._limit = self.SMALL * capacity
        self._small: OrderedDict[bytes, int] = OrderedDict()
        self._main: OrderedDict[bytes, int] = OrderedDict()
        self._ghost: OrderedDict[bytes, None] = OrderedDict()
        self._uses: dict[bytes, int] = {}
        self._small_bytes = 0

    def add(self, key: bytes, nbytes: int, cost: float) -> None:
        if key in self._uses:
            self.touch(key)
            return
        self._uses[key] = 0
        if key in self._ghost:
            del self._ghost[key]
            self._main[key] = nbytes
        else:
            self._small[key] = nbytes
            self._small_bytes += nbytes

    def touch(self, key: bytes) -> None:
        if key in self._uses:
            self._uses[key] = min(self._uses[key] + 1, self.MOST_USES)

    def remove(self, key: bytes) -> None:
        self._uses.pop(key, None)
        self._main.pop(key, None)
        if key in self._small:
            self._small_bytes -= self._small.pop(key)
            self._ghost[key] = None
            while len(self._ghost) > len(self._main) + len(self._small) + 1:
                self._ghost.popitem(last=False)

    def victim(self, skip: Skip) -> bytes | None:
        if self._small_bytes > self._limit or not self._main:
            for key in list(self._small):
                if self._uses[key] > 1 and not skip(key):
                    self._small_bytes -= self._small[key]
                    self._main[key], self._uses[key] = self._small.pop(key), 0
                elif not skip(key):
                    return key
        for _ in range((self.MOST_USES + 1) * len(self._main)):
            key = next(iter(self._main))
            if not skip(key) and self._uses[key] == 0:
                return key
            self._uses[key] = max(self._uses[key] - (not skip(key)), 0)
            self._main.move_to_end(key)
        return _first(self._small, skip)


@policies.register("arc")
class Arc:
    """Adaptive replacement (Megiddo and Modha, FAST 2003), in bytes: recency and frequency share the room.

    Ghosts of both lists move the share, `target` bytes for what was used once, towards the list that loses hits.
    """

    def __init__(self, capacity: int):
        self._capacity, self._target = capacity, 0.0
        self._once, self._often, self._once_ghost, self._often_ghost = (_Queue() for _ in range(4))

    def add(self, key: bytes, nbytes: int, cost: float) -> None:
        if key in self._once.items or key in self._often.items:
            self.touch(key)
            return
        a, b = self._once_ghost, self._often_ghost
        if key in a.items:
            self._target = min(self._capacity, self._target + nbytes * max(1.0, b.nbytes / max(a.nbytes, 1)))
            a.pop(key)
            self._often.push(key, nbytes)
        elif key in b.items:
            self._target = max(0.0, self._target - nbytes * max(1.0, a.nbytes / max(b.nbytes, 1)))
            b.pop(key)
            self._often.push(key, nbytes)
        else:
            self._once.push(key, nbytes)

    def touch(self, key: bytes) -> None:
        for queue in (self._once, self._often):
            if key in queue.items:
                self._often.push(key, queue.pop(key))
                return

    def remove(self, key: bytes) -> None:
        for queue, ghost in ((self._once, self._once_ghost), (self._often, self._often_ghost)):
            if key in queue.items:
                ghost.push(key, queue.pop(key))
                while ghost.nbytes > self._capacity:
                    ghost.pop(next(iter(ghost.items)))

    def victim(self, skip: Skip) -> bytes | None:
        first, second = (self._once, self._often)
        if self._once.nbytes <= self._target:
            first, second = second, first
        return _first(first.items, skip) or _first(second.items, skip)


class _Queue:
    """Keys in order, with the sum of their bytes."""

    def __init__(self) -> None:
        self.items: OrderedDict[bytes, int] = OrderedDict()
        self.nbytes = 0

    def push(self, key: bytes, nbytes: int) -> None:
        self.items[key] = nbytes
        self.nbytes += nbytes

    def pop(self, key: bytes) -> int:
        nbytes = self.items.pop(key)
        self.nbytes -= nbytes
        return nbytes
