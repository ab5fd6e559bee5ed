"""The KV engine: chunks by key over tiers, asynchronous and layer by layer."""

from lmcache_blend.engine.config import EngineConfig, TierConfig
from lmcache_blend.engine.engine import Found, KVEngine
from lmcache_blend.engine.eviction import register_eviction
from lmcache_blend.engine.faults import FaultConfig
from lmcache_blend.engine.keys import Keyer, chunk_key, context_digest
from lmcache_blend.engine.memory import MemoryStore
from lmcache_blend.engine.store import ChunkStore, Stored
from lmcache_blend.engine.tiers import make_tier, register_tier
from lmcache_blend.engine.tiers.base import tiers

__all__ = [
    "ChunkStore",
    "EngineConfig",
    "FaultConfig",
    "Found",
    "KVEngine",
    "Keyer",
    "MemoryStore",
    "Stored",
    "TierConfig",
    "chunk_key",
    "context_digest",
    "make_tier",
    "register_eviction",
    "register_tier",
    "tiers",
]
