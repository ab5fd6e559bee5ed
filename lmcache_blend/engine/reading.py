"""The way up: read, check and decode chunks of one level; whatever fails is counted and is a miss."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lmcache_blend.codecs.pipeline import Allocate, fresh
from lmcache_blend.engine import values
from lmcache_blend.engine.level import Level
from lmcache_blend.engine.tiers.base import Miss, Outcome
from lmcache_blend.errors import ConfigError, CorruptChunkError
from lmcache_blend.types import KVChunk

Read = tuple[KVChunk | None, int]
"""A chunk and the bytes of its value; (None, 0) for a miss."""
MISS: Read = (None, 0)
Room = Callable[[bytes, int], np.ndarray | None]
Filled = Callable[[bytes, KVChunk, np.ndarray | None], None]


def read(
    level: Level,
    keys: Sequence[bytes],
    into: Sequence[Any] | None = None,
    room: Room = lambda key, nbytes: None,
    filled: Filled = lambda key, chunk, slot: None,
    leaving: bool = False,
    landing: Allocate = fresh,
) -> list[Read]:
    """Whole chunks of one level.

    leaving: also those that are just being evicted. landing: gives memory where neither into nor room does.
    into: buffers to read into. room: gives the memory to read a value into, or None. filled: called
    with every chunk that came out well, and with its raw value where that lies in memory that `room` gave.
    Raises ConfigError for a buffer that is too short.
    """
    out, rows, buffers, slots = [MISS] * len(keys), [], [], []
    for i, size in enumerate(level.lookup(keys, leaving)):
        if isinstance(size, Miss):
            level.metrics.miss(level.cause(size))
            continue
        slot = None
        if into is not None:
            buffer = memoryview(into[i]).cast("B")
            if len(buffer) < size:
                raise ConfigError(f"buffer {i} has {len(buffer)} bytes, the value of its chunk {size}")
            buffer = buffer[:size]
        elif level.memory is not None:
            buffer = level.memory.view(keys[i])
            if buffer is None:
                level.missed(keys[i], Miss("absent"))
                continue
        else:
            slot = room(keys[i], size)
            buffer = (landing(size) if slot is None else slot).data
        rows.append(i)
        buffers.append(buffer)
        slots.append(slot)
    wanted, hits = [keys[i] for i in rows], []
    trusted = level.memory is not None
    incoming = [values.Incoming(key, buffer, trusted) for key, buffer in zip(wanted, buffers, strict=True)]

    def arrived(j: int, outcome: Outcome) -> None:
        if isinstance(outcome, Miss):
            level.missed(wanted[j], outcome)
            return
        try:
            head = incoming[j].whole()
        except CorruptChunkError as error:
            level.failed(wanted[j], error)
            return
        try:
            chunk = head.chunk(buffers[j], level.coder(head))
        except Exception as error:  # of whatever codec
            level.failed(wanted[j], error)
            return
        out[rows[j]] = chunk, len(buffers[j])
        hits.append(wanted[j])
        filled(wanted[j], chunk, slots[j] if head.meta.codec is None else None)

    if trusted and into is None:
        for j, buffer in enumerate(buffers):
            arrived(j, len(buffer))
    else:
        level.read(wanted, buffers, incoming, arrived)
    level.metrics.hit(len(hits))
    level.touch(hits)
    return out
