"""Connections to a Redis server or cluster, by redis-py, handed out as a Wire with a deadline."""

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from lmcache_blend.engine.tiers.resp import Wire, command
from lmcache_blend.errors import ConfigError

REFRESH_S = 1.0
"""A cluster's map is asked for at most so often."""


class Servers:
    """A server, or every node of a cluster; which of the two is asked at the first use.

    Raises ConfigError on a URL that redis-py does not take; afterwards TimeoutError and ConnectionError only.
    """

    def __init__(self, url: str, timeout_s: float):
        try:
            import redis
        except ImportError:
            raise ConfigError("a redis:// tier needs redis-py: pip install lmcache-blend[redis]") from None
        self._redis = redis
        parts = urlsplit(url)
        self.where = f"{parts.scheme}://{re.sub('.*@', '', parts.netloc)}{parts.path}"
        """The URL without user, password and options, for people."""
        self._url = re.sub(r"^redis\+unix:", "unix:", url)
        # Connecting and log-in may take half of the time each, so that both end within it; none of redis-py's retries,
        # since the engine has its own.
        self._options: dict[str, Any] = {
            "socket_connect_timeout": timeout_s / 2,
            "socket_timeout": timeout_s / 2,
            "protocol": 2,
        }
        try:
            self._pool = redis.ConnectionPool.from_url(self._url, **self._options)
            self._pool.make_connection()
        except (ValueError, TypeError, redis.RedisError) as error:
            raise ConfigError(f"{self.where} is no usable URL of a Redis server: {error}") from None
        self._cluster: Any = None
        self._known = False
        self._refreshing, self._refreshed = threading.Lock(), 0.0

    def nodes(self) -> list[Any]:
        """What `wire` takes: a primary of the cluster each, or the one server."""
        cluster = self._find_out()
        return [None] if cluster is None else cluster.get_primaries()

    def route(self, names: Sequence[str], indices: Sequence[int]) -> dict[Any, list[int]]:
        """Which node has which names, as lists of `indices`."""
        cluster = self._find_out() if names else None
        if cluster is None:
            return {None: list(indices)} if names else {}
        nodes: dict[str, Any] = {}
        out: dict[str, list[int]] = {}
        for name, i in zip(names, indices, strict=True):
            try:
                node = cluster.get_node_from_key(name)
            except self._redis.RedisError as error:
                raise ConnectionError(f"no node of {self.where} has the slot: {error}") from None
            nodes[node.name] = node
            out.setdefault(node.name, []).append(i)
        return {nodes[name]: found for name, found in out.items()}

    @contextmanager
    def wire(self, node: Any, deadline: float) -> Iterator[Wire]:
        """A connection of one's own. One that an error leaves in the middle of a reply is closed."""
        pool = self._pool if node is None else self._cluster.get_redis_connection(node).connection_pool
        connection = None
        try:
            connection = pool.get_connection()
            yield Wire(connection._sock, deadline)
        except BaseException as error:
            if connection is not None:
                connection.disconnect()
            if isinstance(error, OSError | self._redis.RedisError) and node is not None:
                self.refresh(0.0, deadline)
            if isinstance(error, self._redis.TimeoutError):
                raise TimeoutError(f"{self.where}: {error}") from None
            if isinstance(error, self._redis.RedisError):
                raise ConnectionError(f"{self.where}: {error}") from None
            raise
        finally:
            if connection is not None:
                pool.release(connection)

    def refresh(self, wait_s: float, deadline: float) -> None:
        """Ask for the cluster's map again, after a while; by one thread, and not too often."""
        if self._cluster is None:
            return
        time.sleep(max(0.0, min(wait_s, deadline - time.monotonic())))
        if time.monotonic() - self._refreshed < REFRESH_S or not self._refreshing.acquire(blocking=False):
            return
        try:
            self._refreshed = time.monotonic()
            self._cluster.nodes_manager.initialize()
        except self._redis.RedisError:
            pass  # the next call meets the same servers and says what is wrong with them
        finally:
            self._refreshing.release()

    def close(self) -> None:
        self._pool.disconnect()
        if self._cluster is not None:
            self._cluster.close()

    def _find_out(self) -> Any:
        """The cluster, or None for a single server. No lock: of several threads at a hung server each waits once."""
        if self._known:
            return self._cluster
        with self.wire(None, time.monotonic() + self._options["socket_timeout"]) as wire:
            wire.send([command("INFO", "cluster")])
            text = wire.reply()
        if isinstance(text, bytes) and b"cluster_enabled:1" in text:
            from redis.backoff import NoBackoff
            from redis.retry import Retry

            try:
                self._cluster = self._redis.RedisCluster.from_url(
                    self._url, retry=Retry(NoBackoff(), 0), require_full_coverage=False, **self._options
                )
            except self._redis.RedisError as error:
                raise ConnectionError(f"{self.where}: {error}") from None
        self._known = isinstance(text, bytes)
        return self._cluster
