"""One tier as the engine sees it: coded values, room made by eviction, pins kept, quotas, counted."""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, get_args

from lmcache_blend.codecs import Codec, get_codec
from lmcache_blend.engine import values
from lmcache_blend.engine.config import TierConfig
from lmcache_blend.engine.events import EventLog
from lmcache_blend.engine.eviction import policies
from lmcache_blend.engine.faults import Each, Guard
from lmcache_blend.engine.keys import TENANT_BYTES, tenant
from lmcache_blend.engine.tiers.base import (
    ABSENT,
    MemoryTier,
    Miss,
    Outcome,
    PinningTier,
    SteppingTier,
    Tier,
    Value,
    make_tier,
    size_of,
)
from lmcache_blend.errors import CorruptChunkError, ForeignChunkError, LMCacheBlendError
from lmcache_blend.metrics import MissCause, TierMetrics

Sink = Callable[[bytes], bool] | None
"""Writes a chunk that no tier below holds to where it is kept, before it is evicted; whether it may go. None: such
chunks stay, so that nobody waits for a tier below."""

CAUSES = frozenset(get_args(MissCause))


class Full(OSError):
    """A chunk was not stored: the tier has no room. These are names in the metric of errors."""


class TooLarge(OSError):
    """A chunk was not stored: it is larger than the tier."""


class ReadOnly(OSError):
    """A chunk was not stored: the tier takes none."""


REFUSED = {"full": Full(), "too_large": TooLarge(), "read_only": ReadOnly()}

PART_BYTES = 16 << 20
"""Read by one call of a batch, about."""
ROUNDS = 16
"""How often room is made for one value before it is given up: other processes may take the room."""


class Pins:
    """The pins of one engine, on the monotonic clock."""

    def __init__(self) -> None:
        self._until: dict[bytes, float] = {}

    def add(self, keys: Sequence[bytes], seconds: float) -> list[bytes]:
        """Pin keys; the longer of two pins holds. Those that had none before."""
        until, now = time.monotonic() + seconds, time.monotonic()
        new = [key for key in keys if self._until.get(key, 0.0) <= now]
        for key in keys:
            self._until[key] = max(until, self._until.get(key, 0.0))
        return new

    def drop(self, key: bytes) -> bool:
        """End a pin; whether there was one."""
        return self._until.pop(key, 0.0) > time.monotonic()

    def holds(self, key: bytes) -> bool:
        until = self._until.get(key)
        if until is not None and until <= time.monotonic():
            self._until.pop(key, None)
            return False
        return until is not None


class Level:
    """A tier with its codec, policy, guard and metrics. pins: those of the engine."""

    def __init__(self, config: TierConfig, pins: Pins, events: EventLog):
        self.config, self.name, self.events = config, config.label, events
        self.tier: Tier = make_tier(config.tier, **config.options)
        self.memory = self.tier if isinstance(self.tier, MemoryTier) else None
        self.codec: Codec | None = None if config.codec is None else get_codec(config.codec)
        self.metrics = TierMetrics(self.name)
        self.guard = Guard(self.tier, self.name, config.faults, self.metrics)
        self.dirty: set[bytes] = set()
        """Keys that no tier below holds yet."""
        self._steps = isinstance(self.tier, SteppingTier)
        self._pins = pins
        self._quotas = {tenant(salt): limit for salt, limit in config.quotas.items()}
        self._policy = policies.get(config.eviction)(self.tier.capacity_bytes or 0)
        self._sizes: dict[bytes, int] = {}
        self._costs: dict[bytes, float] = {}
        self._tenants: Counter[bytes] = Counter()
        self._leaving: set[bytes] = set()
        self._others_pins: dict[bytes, float] = {}
        self._unusable: dict[bytes, Miss] = {}
        """Values that are there, and cannot be decoded or deleted: not read again, and replaced by the next store."""
        self._lock = threading.Lock()
        self._adopted = -60.0
        if self.evicts:
            self.adopt()

    @property
    def evicts(self) -> bool:
        """Whether the engine decides what leaves."""
        return self.tier.capacity_bytes is not None or bool(self._quotas)

    # ------------------------------------------------------------------ reading
    def lookup(self, keys: Sequence[bytes], leaving: bool = False) -> list[Outcome]:
        """Size of each value; a chunk that is just being evicted is absent, unless `leaving`."""
        out = self.guard.call("lookup", keys)
        if max((o for o in out if isinstance(o, int)), default=0) > values.MAX_VALUE:
            out = [Miss("too_large") if isinstance(o, int) and o > values.MAX_VALUE else o for o in out]
        if self._unusable:
            for key, o in zip(keys, out, strict=True):
                if o == ABSENT:
                    self._unusable.pop(key, None)
            out = [o if isinstance(o, Miss) else self._unusable.get(k, o) for k, o in zip(keys, out, strict=True)]
        if self._leaving and not leaving:
            out = [Miss("absent") if key in self._leaving else o for key, o in zip(keys, out, strict=True)]
        return out

    def get(self, keys: Sequence[bytes], buffers: Sequence[memoryview], offsets: Sequence[int]) -> list[Outcome]:
        """Read parts of values into buffers, timed and counted."""
        return self._read("get", keys, buffers, offsets)

    def read(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[memoryview],
        reached: Sequence[Callable[[int], int]],
        each: Each,
    ) -> list[Outcome]:
        """Read whole values, timed and counted. reached: of a SteppingTier, which others do not need. each: called with
        every outcome as soon as it is known, so that decoding one chunk overlaps reading the next."""
        if self._steps:
            return self._read("get_stepwise", keys, buffers, reached, each)
        return self._read("get", keys, buffers, [0] * len(keys), each)

    def _read(
        self,
        operation: str,
        keys: Sequence[bytes],
        buffers: Sequence[memoryview],
        column: Sequence[Any],
        each: Each = lambda i, outcome: None,
    ) -> list[Outcome]:
        began = time.perf_counter()
        part = max(1, PART_BYTES * len(keys) // max(sum(b.nbytes for b in buffers), 1))
        part = min(part, -(-len(keys) // self.tier.threads))
        out = self.guard.call(operation, keys, buffers, column, each=each, part=part)
        self.metrics.moved("read", sum(o for o in out if isinstance(o, int)), time.perf_counter() - began)
        return out

    def coder(self, head: values.Head) -> Codec | None:
        """The codec of a value: this level's own where it has that id, else the one that the value names."""
        config = head.meta.codec
        if config is None or (self.codec is not None and self.codec.get_config()["id"] == config["id"]):
            return self.codec
        try:
            return get_codec({k: v for k, v in config.items() if k != "profile"})
        except LMCacheBlendError as error:
            raise ForeignChunkError(f"the value's codec is none of ours: {error}") from None

    def touch(self, keys: Sequence[bytes]) -> None:
        """The chunks were used."""
        if self.evicts:
            with self._lock:
                for key in keys:
                    self._policy.touch(key)

    @staticmethod
    def cause(miss: Miss) -> MissCause:
        """As the metric of misses calls it."""
        return miss.cause if miss.cause in CAUSES else "error"  # pyright: ignore[reportReturnType]

    def missed(self, key: bytes, miss: Miss) -> None:
        """A chunk could not be served though it was found: count why, and delete what is damaged."""
        self.metrics.miss("evicted" if miss.cause == "absent" else self.cause(miss))
        if miss.cause == "corrupt":
            (out,) = self.delete([key])
            if isinstance(out, Miss) and out != ABSENT:
                self._unusable[key] = miss
        elif miss.cause == "absent":
            self._forget(key)

    def failed(self, key: bytes, error: Exception) -> Miss:
        """A value was read and does not decode: count why. Only what is damaged is deleted."""
        if isinstance(error, CorruptChunkError) and not isinstance(error, ForeignChunkError):
            miss = Miss("corrupt", str(error))
        else:
            miss = Miss("error", f"{type(error).__name__}: {error}")
            self.metrics.error(error)
            if isinstance(error, ForeignChunkError):
                self._unusable[key] = miss
        self.missed(key, miss)
        return miss

    # ------------------------------------------------------------------ writing
    def encode(self, key: bytes, chunk) -> Value:
        """The value that this tier stores of a chunk."""
        return values.encode(key, chunk, self.codec)

    def put(self, keys: Sequence[bytes], stored: Sequence[Value], costs: Sequence[float], sink: Sink) -> list[Outcome]:
        """Store values, making room as needed. sink: see `Sink`."""
        sizes, began = [size_of(value) for value in stored], time.perf_counter()
        out: list[Outcome] = []
        # In shares of the tier, so that the room made for one value is not taken by the next of the same batch.
        most = math.inf if self.tier.capacity_bytes is None else self.tier.capacity_bytes // 8
        start = total = 0
        for i in range(len(keys) + 1):
            if i == len(keys) or (i > start and total + sizes[i] > most):
                part = slice(start, i)
                out += self._put(keys[part], stored[part], sizes[part], costs[part], sink)
                start, total = i, 0
            total += sizes[i] if i < len(keys) else 0
        self.metrics.moved("write", sum(o for o in out if isinstance(o, int)), time.perf_counter() - began)
        for o in out:
            if isinstance(o, Miss) and o.cause in REFUSED:
                self.metrics.error(REFUSED[o.cause])
        return out

    def _put(
        self, keys: Sequence[bytes], stored: Sequence[Value], sizes: Sequence[int], costs: Sequence[float], sink: Sink
    ) -> list[Outcome]:
        out: list[Outcome] = [Miss("full")] * len(keys)
        left = self._admitted(keys, sizes, sink)
        self.make_room(b"", sum(sizes[i] for i in left), sink)
        left = [i for i in left if self.make_room(keys[i], sizes[i], sink)]
        for _ in range(ROUNDS):
            done = self.guard.call("put", [keys[i] for i in left], [stored[i] for i in left], part=len(left))
            for i, o in zip(left, done, strict=True):
                out[i] = o
                if isinstance(o, int):
                    self.added(keys[i], o, costs[i], sink)
            left = [i for i in left if isinstance(o := out[i], Miss) and o.cause == "full"]
            # Full in spite of the count: fragments, readers that hold freed slots, or another process's chunk.
            left = [i for i in left if self.evict(sizes[i], lambda key: True, sink)]
            if not left:
                break
        return out

    def added(self, key: bytes, nbytes: int, cost: float, sink: Sink = None) -> None:
        """A chunk is in the tier now."""
        who = key[:TENANT_BYTES]
        with self._lock:
            self._know(key, nbytes, cost)
            self._unusable.pop(key, None)
        self.events.publish("stored", self.name, [key])
        if who in self._quotas and (over := self._tenants[who] - self._quotas[who]) > 0:
            self.evict(over, lambda k: k[:TENANT_BYTES] == who, sink)  # several were stored side by side

    def delete(self, keys: Sequence[bytes]) -> list[Outcome]:
        """Bytes freed by each key."""
        with self._lock:
            self._leaving.update(keys)
        out = self.guard.call("delete", keys)
        gone = [k for k, o in zip(keys, out, strict=True) if isinstance(o, int) or o.cause == "absent"]
        with self._lock:
            self._leaving.difference_update(keys)
            for key in gone:
                self._drop(key)
        if gone:
            self.events.publish("removed", self.name, gone)
        return out

    # ------------------------------------------------------------------ room
    def _admitted(self, keys: Sequence[bytes], sizes: Sequence[int], sink: Sink) -> list[int]:
        """Which of a batch fit their tenants' quotas, of too many the last; the tenant's older chunks make room."""
        out: list[int] = []
        for who in {key[:TENANT_BYTES] for key in keys}:
            mine, quota = [i for i, key in enumerate(keys) if key[:TENANT_BYTES] == who], self._quotas.get(who)
            while quota is not None and mine:
                total, held = sum(sizes[i] for i in mine), sum(self._sizes.get(keys[i], 0) for i in mine)
                over = self._tenants[who] - held + total - quota
                if over <= 0:
                    break
                if total > quota or not self.evict(over, lambda k, who=who: k[:TENANT_BYTES] == who, sink):
                    del mine[0]
            out += mine
        return sorted(out)

    def make_room(self, key: bytes, nbytes: int, sink: Sink) -> bool:
        """Evict until a value of that size fits its tenant's quota and the tier; whether it does.

        sink: see `Sink`.
        """
        who, capacity = key[:TENANT_BYTES], self.tier.capacity_bytes
        quota = self._quotas.get(who)
        if quota is not None:
            while self._tenants[who] - self._sizes.get(key, 0) + nbytes > quota:
                if nbytes > quota or not self.evict(1, lambda k: k[:TENANT_BYTES] == who, sink):
                    return False
        if capacity is None:
            return True
        for _ in range(ROUNDS):
            usage = self.guard.ask("usage")
            if isinstance(usage, Miss) or nbytes > capacity:
                return True  # the tier itself says what is wrong when it is asked to store
            over = usage.nbytes - self._sizes.get(key, 0) + nbytes - capacity
            if over <= 0:
                return True
            if not self.evict(over, lambda k: True, sink):
                return False
        return False

    def evict(self, nbytes: int, among: Callable[[bytes], bool], sink: Sink) -> bool:
        """Let go of at least so many bytes of unpinned chunks; whether that was possible."""
        freed, clean_only = 0, sink is None
        while freed < nbytes:
            key = self._victim(lambda k: among(k) and not (clean_only and k in self.dirty))
            if key is None:
                return False
            if sink is not None and key in self.dirty and not sink(key):
                with self._lock:
                    self._leaving.discard(key)
                    self._policy.touch(key)
                return False
            (out,) = self.guard.call("delete", [key])
            with self._lock:
                self._leaving.discard(key)
                if isinstance(out, int) or out.cause == "absent":
                    self._drop(key)
                elif out.cause == "pinned":
                    self._others_pins[key] = time.monotonic() + 5.0
                else:
                    return False
            if isinstance(out, int):
                freed += out
                self.metrics.evicted()
                self.events.publish("removed", self.name, [key])
        return True

    def _victim(self, among: Callable[[bytes], bool]) -> bytes | None:
        for again in (True, False):
            now = time.monotonic()
            with self._lock:
                self._others_pins = {k: t for k, t in self._others_pins.items() if t > now}
                key = self._policy.victim(
                    lambda k: k in self._leaving or k in self._others_pins or self._pins.holds(k) or not among(k)
                )
                if key is not None:
                    self._leaving.add(key)
                    return key
            # Perhaps other processes have filled the tier.
            if not again or now - self._adopted < 1.0:
                return None
            self.adopt()
        return None

    def adopt(self) -> None:
        """Get to know what the tier holds already, the least recently changed first."""
        self._adopted = time.monotonic()
        with suppress(Exception):  # of whatever client; what the tier holds is then met one by one
            found = sorted(self.tier.entries(), key=lambda e: e.modified)
            with self._lock:
                for entry in found:
                    if entry.key not in self._sizes and entry.key not in self._leaving:
                        self._know(entry.key, entry.nbytes, 1.0)

    def _know(self, key: bytes, nbytes: int, cost: float) -> None:
        if self.evicts:
            self._tenants[key[:TENANT_BYTES]] += nbytes - self._sizes.get(key, 0)
            self._sizes[key] = nbytes
            self._policy.add(key, nbytes, cost)

    def _drop(self, key: bytes) -> None:
        self.dirty.discard(key)
        if key in self._sizes:
            self._tenants[key[:TENANT_BYTES]] -= self._sizes.pop(key)
            self._policy.remove(key)

    def _forget(self, key: bytes) -> None:
        with self._lock:
            self._drop(key)

    def is_leaving(self, key: bytes) -> bool:
        return key in self._leaving

    # ------------------------------------------------------------------ pins
    def pin(self, keys: Sequence[bytes], until: float) -> list[Outcome]:
        """Size of each chunk that is now pinned here. until: seconds since the epoch."""
        with self._lock:
            leaving = set(self._leaving)
        if isinstance(self.tier, PinningTier):
            out = self.guard.call("pin", keys, until)
        else:
            out = self.guard.call("lookup", keys)
        return [Miss("absent") if key in leaving else o for key, o in zip(keys, out, strict=True)]

    def unpin(self, keys: Sequence[bytes]) -> list[Outcome]:
        """Size of each chunk whose pin ended here, of tiers that keep pins."""
        return self.guard.call("unpin", keys) if isinstance(self.tier, PinningTier) else [ABSENT] * len(keys)

    def close(self) -> None:
        self.guard.close()
        self.tier.close()
