"""Reuse the KV cache of text at any position in a prompt: CacheBlend, its rivals, and a harness that measures them."""

from lmcache_blend.blend.blender import Blender
from lmcache_blend.blend.policies import RowPolicy, register_policy
from lmcache_blend.blend.prefill import Prefill
from lmcache_blend.codecs import get_codec, register_codec
from lmcache_blend.config import BlendConfig
from lmcache_blend.engine import KVEngine, MemoryStore, register_tier
from lmcache_blend.types import KVChunk, Prompt, Trace

__version__ = "0.1.0"

__all__ = [
    "BlendConfig",
    "Blender",
    "KVChunk",
    "KVEngine",
    "MemoryStore",
    "Prefill",
    "Prompt",
    "RowPolicy",
    "Trace",
    "get_codec",
    "register_codec",
    "register_policy",
    "register_tier",
]
