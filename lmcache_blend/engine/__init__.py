"""Where KV chunks live: keys and stores."""

from lmcache_blend.engine.keys import chunk_key, context_digest
from lmcache_blend.engine.store import ChunkStore, MemoryStore, Stored, register_tier, tiers

__all__ = ["ChunkStore", "MemoryStore", "Stored", "chunk_key", "context_digest", "register_tier", "tiers"]
