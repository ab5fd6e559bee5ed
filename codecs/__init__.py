"""Codecs: a KV chunk to bytes and back. One file per codec, one registry, ids and JSON configs as names."""

if __name__ == "codecs":
    raise ImportError("this folder is lmcache_blend.codecs, not the standard library's codecs")

from lmcache_blend.codecs import entropy, quantise, transforms
from lmcache_blend.codecs.base import Codec, codecs, get_codec, register_codec, short_name
from lmcache_blend.codecs.cachegen import CacheGen
from lmcache_blend.codecs.fisher import FisherDiagonal, FisherKLT
from lmcache_blend.codecs.hadamard import Hadamard
from lmcache_blend.codecs.kivi import Kivi
from lmcache_blend.codecs.kvtc import Kvtc
from lmcache_blend.codecs.lossless import Lossless
from lmcache_blend.codecs.pipeline import CodedChunk, Pipeline, PipelineCodec
from lmcache_blend.codecs.profile import Profile
from lmcache_blend.codecs.raw import Raw
from lmcache_blend.codecs.scalar import Fp8, Int4, Int8
from lmcache_blend.codecs.stages import Plane, Stage, register_stage, stages
from lmcache_blend.codecs.zstd import Zstd

__all__ = [
    "CacheGen",
    "Codec",
    "CodedChunk",
    "FisherDiagonal",
    "FisherKLT",
    "Fp8",
    "Hadamard",
    "Int4",
    "Int8",
    "Kivi",
    "Kvtc",
    "Lossless",
    "Pipeline",
    "PipelineCodec",
    "Plane",
    "Profile",
    "Raw",
    "Stage",
    "Zstd",
    "codecs",
    "entropy",
    "get_codec",
    "quantise",
    "register_codec",
    "register_stage",
    "short_name",
    "stages",
    "transforms",
]
