"""The store in this process's memory, for experiments: an engine of one tier, and a chunk is there when put returns."""

from collections.abc import Iterator

from lmcache_blend.codecs import Codec
from lmcache_blend.engine.config import EngineConfig, TierConfig
from lmcache_blend.engine.engine import KVEngine
from lmcache_blend.types import KVChunk


class MemoryStore(KVEngine):
    """Chunks in memory; the least recently used ones go when max_bytes is passed.

    codec: chunks are kept encoded and decoded at every get, as a tier behind a network would; None keeps tensors.
    """

    def __init__(self, codec: Codec | None = None, max_bytes: int | None = None):
        options = {"capacity_bytes": max_bytes, "pool": False}
        super().__init__(EngineConfig(tiers=(TierConfig(tier="cpu", options=options),)))
        self.top.codec, self.max_bytes = codec, max_bytes

    def put(self, key: bytes, chunk: KVChunk) -> None:
        """As `store`; a coded chunk is met as it was coded, also by the very next get."""
        self.store([key], [chunk], wait=True)

    def __iter__(self) -> Iterator[bytes]:
        """Keys of what is stored."""
        return iter([entry.key for entry in self.top.tier.entries()])

    def __len__(self) -> int:
        return self.top.tier.usage().chunks

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.top.tier.usage().nbytes
