"""The tier in this process's memory: one arena, slots handed out without copying, freed with their last reader."""

import threading
from collections.abc import Iterator, Sequence

import numpy as np

from lmcache_blend.engine.arena import Arena, HugePages
from lmcache_blend.engine.copying import Piece, copy_all
from lmcache_blend.engine.tiers.base import (
    ABSENT,
    Entry,
    Miss,
    Outcome,
    Usage,
    Value,
    check_keys,
    register_tier,
    size_of,
)

FULL = Miss("full")


@register_tier("cpu")
class CpuTier:
    """RAM of this process; capacity_bytes are taken from the system at once, and used page by page.

    capacity_bytes: None takes memory value by value, without a limit. huge_pages: "off", "transparent", "reserved".
    numa_node: where the memory lies. pin: by default where CUDA is there. pool: False takes it value by value as well,
    up to capacity_bytes. Raises ConfigError.
    """

    threads = 1

    def __init__(
        self,
        capacity_bytes: int | None = None,
        huge_pages: HugePages = "off",
        numa_node: int | None = None,
        pin: bool | None = None,
        pool: bool = True,
    ):
        self.capacity_bytes = capacity_bytes
        self.arena = Arena(capacity_bytes, huge_pages, numa_node, pin) if pool and capacity_bytes is not None else None
        self._slots: dict[bytes, np.ndarray] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, keys: Sequence[bytes], values: Sequence[Value]) -> list[Outcome]:
        check_keys(keys)
        return [self._put(key, value, size_of(value)) for key, value in zip(keys, values, strict=True)]

    def _put(self, key: bytes, value: Value, size: int) -> Outcome:
        slot = self.reserve(size)
        if isinstance(slot, Miss):
            return slot
        at = 0
        for part in value:
            piece = np.frombuffer(part, np.uint8)
            slot[at : at + piece.size] = piece
            at += piece.size
        return self.commit(key, slot)

    def reserve(self, size: int) -> np.ndarray | Miss:
        """Room for a value, [size] uint8 to be filled and then committed; dropped, it is free again. Misses: as put."""
        if self.capacity_bytes is not None and size > self.capacity_bytes:
            return Miss("too_large", f"{size} bytes do not fit into {self.capacity_bytes}")
        if self.arena is None:
            return np.empty(size, np.uint8)
        slot = self.arena.take(size)
        return FULL if slot is None else slot

    def commit(self, key: bytes, slot: np.ndarray) -> Outcome:
        """Make a filled slot the value of a key."""
        check_keys([key])
        with self._lock:
            old = self._slots.get(key)
            after = self._bytes + slot.size - (0 if old is None else old.size)
            if self.capacity_bytes is not None and after > self.capacity_bytes:
                return FULL
            self._slots[key], self._bytes = slot, after
        return slot.size

    def view(self, key: bytes) -> memoryview | None:
        """The value itself, not to be written to; stays valid for as long as someone refers to it."""
        slot = self._slots.get(key)
        return None if slot is None else slot.data

    def get(
        self, keys: Sequence[bytes], buffers: Sequence[memoryview], offsets: Sequence[int] | None = None
    ) -> list[Outcome]:
        check_keys(keys)
        out: list[Outcome] = []
        pieces: list[Piece] = []
        slots = [self._slots.get(key) for key in keys]
        for slot, buffer, at in zip(slots, buffers, offsets or [0] * len(keys), strict=True):
            if slot is None:
                out.append(ABSENT)
            elif at + buffer.nbytes > slot.size:
                out.append(Miss("corrupt", f"{slot.size} bytes end before {at + buffer.nbytes}"))
            else:
                pieces.append((np.frombuffer(buffer, np.uint8).ctypes.data, slot.ctypes.data + at, buffer.nbytes))
                out.append(buffer.nbytes)
        copy_all(pieces)
        return out

    def lookup(self, keys: Sequence[bytes]) -> list[Outcome]:
        slots = self._slots
        check_keys(keys)
        return [ABSENT if (slot := slots.get(key)) is None else slot.size for key in keys]

    def delete(self, keys: Sequence[bytes]) -> list[Outcome]:
        check_keys(keys)
        out: list[Outcome] = []
        for key in keys:
            with self._lock:
                slot = self._slots.pop(key, None)
                self._bytes -= 0 if slot is None else slot.size
            out.append(ABSENT if slot is None else slot.size)
        return out

    def entries(self) -> Iterator[Entry]:
        with self._lock:
            items = list(self._slots.items())
        return (Entry(key, slot.size) for key, slot in items)

    def usage(self) -> Usage:
        return Usage(self._bytes, len(self._slots), self.capacity_bytes)

    def close(self) -> None:
        with self._lock:
            self._slots, self._bytes = {}, 0
