"""Codecs: a KV chunk to bytes and back. One file per codec, one registry, ids and JSON configs as names."""

if __name__ == "codecs":
    raise ImportError("this folder is lmcache_blend.codecs, not the standard library's codecs")

from lmcache_blend.codecs.base import Codec, codecs, get_codec, register_codec
from lmcache_blend.codecs.raw import Raw

__all__ = ["Codec", "Raw", "codecs", "get_codec", "register_codec"]
