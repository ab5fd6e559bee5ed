"""Codecs: a KV chunk to bytes and back. One file per codec, one registry, ids and JSON configs as names."""

if __name__ == "codecs":
    raise ImportError("this folder is lmcache_blend.codecs, not the standard library's codecs")

from lmcache_blend.codecs import entropy, quantise, transforms
from lmcache_blend.codecs.base import Codec, codecs, get_codec, register_codec
from lmcache_blend.codecs.pipeline import Pipeline, PipelineCodec
from lmcache_blend.codecs.profile import Profile
from lmcache_blend.codecs.raw import Raw
from lmcache_blend.codecs.stages import Plane, Stage, register_stage, stages

__all__ = [
    "Codec",
    "Pipeline",
    "PipelineCodec",
    "Plane",
    "Profile",
    "Raw",
    "Stage",
    "codecs",
    "entropy",
    "get_codec",
    "quantise",
    "register_codec",
    "register_stage",
    "stages",
    "transforms",
]
