"""The store protocol and the store in memory. Tiers on disk and over the network register beside it."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from lmcache_blend.codecs import Codec
from lmcache_blend.errors import CorruptChunkError
from lmcache_blend.registry import Registry
from lmcache_blend.types import KVChunk


class Stored(NamedTuple):
    """A chunk and the bytes that were read to get it."""

    chunk: KVChunk
    nbytes: int


class ChunkStore(Protocol):
    """What the Blender asks of a store; a chunk that is missing, unreadable or evicted is None, never an error."""

    def get(self, key: bytes) -> Stored | None: ...

    def put(self, key: bytes, chunk: KVChunk) -> None: ...

    def __contains__(self, key: bytes) -> bool: ...


tiers: Registry[type[ChunkStore]] = Registry("tier", "lmcache_blend.tiers")
register_tier = tiers.register


@tiers.register("memory")
class MemoryStore:
    """Chunks in this process's memory; the least recently used ones go when max_bytes is passed.

    codec: chunks are kept encoded and decoded at every get, as a tier behind a network would; None keeps tensors.
    Safe for several threads.
    """

    def __init__(self, codec: Codec | None = None, max_bytes: int | None = None):
        self.codec, self.max_bytes = codec, max_bytes
        self._items: OrderedDict[bytes, KVChunk | bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Stored | None:
        with self._lock:
            item = self._items.get(key)
            if item is None:
                return None
            self._items.move_to_end(key)
        if not isinstance(item, bytes):
            return Stored(item, item.nbytes)
        assert self.codec is not None
        try:
            return Stored(self.codec.decode(item), len(item))
        except CorruptChunkError:
            return None

    def put(self, key: bytes, chunk: KVChunk) -> None:
        item = chunk if self.codec is None else self.codec.encode(chunk)
        with self._lock:
            old = self._items.pop(key, None)
            self._bytes += _size(item) - (0 if old is None else _size(old))
            self._items[key] = item
            while self.max_bytes is not None and self._bytes > self.max_bytes:
                self._bytes -= _size(self._items.popitem(last=False)[1])

    def __contains__(self, key: bytes) -> bool:
        with self._lock:
            return key in self._items

    def __iter__(self) -> Iterator[bytes]:
        """Keys of what is stored, the least recently used first."""
        with self._lock:
            return iter(list(self._items))

    def __len__(self) -> int:
        return len(self._items)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._bytes


def _size(item: KVChunk | bytes) -> int:
    return len(item) if isinstance(item, bytes) else item.nbytes
