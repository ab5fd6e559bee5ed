"""A directory on a mount that several machines share (NFS, CephFS, Lustre), by URL: file:///mnt/kv."""

from typing import Literal
from urllib.parse import unquote, urlsplit

from lmcache_blend.engine.tiers.base import register_tier
from lmcache_blend.engine.tiers.disk import DiskTier
from lmcache_blend.errors import ConfigError


@register_tier("file")
class SharedFiles(DiskTier):
    """The disk tier with what a shared mount needs.

    fsync: by default "data", since another machine sees a file's new name before the bytes that are still in this
    machine's cache. The mount has to pass file locks on (NFS: without `nolock`). Raises ConfigError.
    """

    def __init__(
        self,
        url: str,
        *,
        capacity_bytes: int | None = None,
        fsync: Literal["none", "data", "full"] = "data",
        threads: int = 4,
    ):
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query:
            raise ConfigError(f"{url!r} names no directory of this machine; write file:///mnt/kv")
        super().__init__(unquote(parts.path), capacity_bytes=capacity_bytes, fsync=fsync, threads=threads)
