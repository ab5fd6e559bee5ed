"""Mooncake Store (https://github.com/kvcache-ai/Mooncake), by URL: mooncake://master:50051.

The pool evicts silently when it is full, so every hit is only ever a hint, and this tier has no capacity of its own.
Its clients listen on every interface, whatever address they are told: run it in a network of its own.
"""

import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from lmcache_blend.engine.tiers.base import (
    ABSENT,
    Entry,
    Miss,
    Outcome,
    Usage,
    Value,
    check_keys,
    register_tier,
    size_of,
)
from lmcache_blend.errors import ConfigError

# mooncake-store/include/types.h: ErrorCode
NO_SPACE, INVALID, NOT_FOUND, NOT_READY = -200, -600, -704, {-703}
MOST_PARTS = 256
LISTING_S = 10.0
REPLACING_S = 1.0
"""A writer that takes longer has died."""


@register_tier("mooncake")
class Mooncake:
    """A Mooncake pool. Raises ConfigError for a bad URL or without the package, ConnectionError without a master.

    local_host: this machine's address, as the pool's other clients reach it. segment_bytes: memory that this process
    gives to the pool. buffer_bytes: that transfers pass through. protocol: "tcp" or "rdma", over `devices`. admin_port:
    the master's HTTP port, which lists keys; needed by `entries` and `usage` only.
    """

    capacity_bytes = None

    def __init__(
        self,
        url: str,
        *,
        local_host: str = "127.0.0.1",
        segment_bytes: int = 0,
        buffer_bytes: int = 256 << 20,
        protocol: str = "tcp",
        devices: str = "",
        admin_port: int = 9003,
        prefix: str = "lmcache-blend/",
        threads: int = 4,
    ):
        try:
            from mooncake.store import MooncakeDistributedStore  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                f"a mooncake:// tier needs Mooncake: pip install lmcache-blend[mooncake], and libibverbs ({error})"
            ) from None
        parts = urlsplit(url)
        if not parts.hostname or parts.port is None or parts.query or parts.path not in ("", "/"):
            raise ConfigError(f"{url!r} is no address of a Mooncake master; write mooncake://host:50051")
        self.threads, self._prefix = threads, prefix
        self._listing = f"http://{parts.hostname}:{admin_port}/get_all_keys"
        self._names = re.compile(re.escape(prefix) + "([0-9a-f]{64})")
        self._store: Any = MooncakeDistributedStore()
        master = f"{parts.hostname}:{parts.port}"
        code = self._store.setup(local_host, "P2PHANDSHAKE", segment_bytes, buffer_bytes, protocol, devices, master)
        if code:
            raise ConnectionError(f"the Mooncake master {master} does not take this client (code {code})")

    def put(self, keys: Sequence[bytes], values: Sequence[Value]) -> list[Outcome]:
        check_keys(keys)
        return [self._put(key, value) for key, value in zip(keys, values, strict=True)]

    def get(
        self, keys: Sequence[bytes], buffers: Sequence[memoryview], offsets: Sequence[int] | None = None
    ) -> list[Outcome]:
        check_keys(keys)
        items = zip(keys, buffers, offsets or [0] * len(keys), strict=True)
        return [self._get(*item) for item in items]

    def lookup(self, keys: Sequence[bytes]) -> list[Outcome]:
        check_keys(keys)
        return [_outcome(self._size(key)) for key in keys]

    def delete(self, keys: Sequence[bytes]) -> list[Outcome]:
        out = self.lookup(keys)
        for i, key in enumerate(keys):
            if isinstance(out[i], int) and (code := self._store.remove(self._name(key), True)):
                out[i] = _outcome(code)
        return out

    def entries(self) -> Iterator[Entry]:
        try:
            with urllib.request.urlopen(self._listing, timeout=LISTING_S) as reply:
                text = reply.read().decode("latin-1")
        except (urllib.error.URLError, TimeoutError) as error:
            raise ConnectionError(f"the Mooncake master does not list its keys at {self._listing}: {error}") from None
        keys = [bytes.fromhex(found[1]) for found in map(self._names.fullmatch, text.splitlines()) if found]
        for key, size in zip(keys, self.lookup(keys), strict=True):
            if isinstance(size, int):
                yield Entry(key, size)

    def usage(self) -> Usage:
        sizes = [entry.nbytes for entry in self.entries()]
        return Usage(sum(sizes), len(sizes), None)

    def close(self) -> None:
        # Its destructor asks the master once more, so it goes now rather than at the end of the process.
        store, self._store = self._store, None
        if store is not None:
            store.close()

    def _name(self, key: bytes) -> str:
        return self._prefix + key.hex()

    def _put(self, key: bytes, value: Value) -> Outcome:
        size, pieces = size_of(value), [memoryview(piece).cast("B") for piece in value if len(piece)]
        if len(pieces) > MOST_PARTS:
            pieces = [b"".join(pieces)]
        if not size:
            return Miss("error", "Mooncake keeps no empty values")
        code = self._store.upsert_parts(self._name(key), *pieces)
        return size if code == 0 else _outcome(code)

    def _get(self, key: bytes, buffer: memoryview, offset: int) -> Outcome:
        if not len(buffer):
            size = self._size(key)
            return Miss("corrupt", f"offset {offset} of {size} bytes") if 0 <= size < offset else _outcome(min(size, 0))
        name, address, code = self._name(key), np.frombuffer(buffer, np.uint8).ctypes.data, INVALID
        if offset == 0:
            code = _when_ready(lambda: self._store.get_into(name, address, len(buffer)))
        if code == INVALID:  # the value is longer than the buffer, or not read from its start
            code = _when_ready(lambda: self._read_range(name, address, len(buffer), offset))
        if 0 <= code < len(buffer):
            return Miss("corrupt", f"{code} bytes of {len(buffer)}")
        return _outcome(code)

    def _read_range(self, name: str, address: int, size: int, offset: int) -> int:
        # Ranges go to registered memory only, whole values also to any other.
        self._store.register_buffer(address, size)
        try:
            ((codes,),) = self._store.get_into_ranges([address], [[name]], [[[0]]], [[[offset]]], [[[size]]])
            return codes[0]
        finally:
            self._store.unregister_buffer(address)

    def _size(self, key: bytes) -> int:
        return _when_ready(lambda: self._store.get_size(self._name(key)))


def _when_ready(ask: Callable[[], int]) -> int:
    """An answer, waited for while another client replaces the value, which is not there in between."""
    end = time.monotonic() + REPLACING_S
    while (code := ask()) in NOT_READY and time.monotonic() < end:
        time.sleep(2e-4)
    return code


def _outcome(code: int) -> Outcome:
    """A size, or the Miss that a negative code stands for."""
    if code >= 0:
        return code
    if code == NOT_FOUND or code in NOT_READY:
        return ABSENT
    cause = "full" if code == NO_SPACE else "corrupt" if code == INVALID else "error"
    return Miss(cause, f"Mooncake's code {code}")
