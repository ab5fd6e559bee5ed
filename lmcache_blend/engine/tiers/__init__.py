"""Tiers: where encoded chunks live. One file per tier, one protocol (`base`), one registry."""

from lmcache_blend.engine.tiers import cpu, disk, nixl, remote_file, remote_mooncake, remote_redis, remote_s3
from lmcache_blend.engine.tiers.base import Entry, Miss, PinningTier, Tier, Usage, make_tier, register_tier, tiers

__all__ = [
    "Entry",
    "Miss",
    "PinningTier",
    "Tier",
    "Usage",
    "cpu",
    "disk",
    "make_tier",
    "nixl",
    "register_tier",
    "remote_file",
    "remote_mooncake",
    "remote_redis",
    "remote_s3",
    "tiers",
]
