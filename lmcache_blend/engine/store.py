"""What the Blender asks of a store. A KVEngine is one; anything else with these methods will do."""

from typing import Any, NamedTuple, Protocol

from lmcache_blend.types import KVChunk


class Stored(NamedTuple):
    """A chunk and the bytes that are read to get it. reads: the transfer, where its layers come one by one."""

    chunk: KVChunk
    nbytes: int
    reads: Any = None


class ChunkStore(Protocol):
    """A chunk that is missing, unreadable or evicted is None, never an error.

    A store may also have `load(keys)`, which gets many at once, and chunks whose layers are still on their way.
    """

    def get(self, key: bytes) -> Stored | None: ...

    def put(self, key: bytes, chunk: KVChunk) -> None: ...

    def __contains__(self, key: bytes) -> bool: ...
