"""Any S3 service, by URL: s3://bucket/prefix?endpoint=http://host:port&region=..., through obstore.

A value is one object named prefix/ab/abcd... (hex of its key), put whole (in parts above 5 MiB, which S3 joins at the
end), so a reader sees the old one or the new one. Credentials come from the environment (AWS_ACCESS_KEY_ID, ...), never
from the URL, which ends up in logs.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlsplit

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
from lmcache_blend.engine.tiers.room import Room
from lmcache_blend.errors import ConfigError, nearest

QUERY = {"endpoint", "region", "virtual_hosted_style_request", "skip_signature"}
TIMED_OUT = re.compile(r"operation timed out|TimedOut|deadline has elapsed")
FULL = re.compile(r"status code: 507|QuotaExceeded|StorageFull|InsufficientStorage")


@register_tier("s3")
class S3:
    """A bucket, or a folder of one, shared by any number of engines; slow to answer, so for the last tier.

    timeout_s: for each request, which is not repeated (the engine retries). threads: requests side by side.
    capacity_bytes: counted by this process and counted anew when it seems used up. Raises ConfigError.
    """

    def __init__(self, url: str, *, timeout_s: float = 10.0, threads: int = 8, capacity_bytes: int | None = None):
        try:
            import obstore
            from obstore.store import S3Store
        except ImportError:
            raise ConfigError("an s3:// tier needs obstore: pip install lmcache-blend[s3]") from None
        if not 0 < timeout_s < math.inf or threads < 1:
            raise ConfigError(f"timeout_s = {timeout_s}, threads = {threads}: they must be above 0 and at least 1")
        parts, config = urlsplit(url), dict(parse_qsl(urlsplit(url).query))
        unknown = sorted(set(config) - QUERY)
        if unknown or not parts.hostname or parts.username:
            wrong = f"unknown option {unknown[0]!r}: {nearest(unknown[0], QUERY)}" if unknown else "it needs a bucket"
            raise ConfigError(f"s3://{parts.hostname or ''}{parts.path} cannot be used: {wrong}; no credentials in it")
        self.threads, self.capacity_bytes = threads, capacity_bytes
        self._obstore = obstore
        self._where = f"s3://{parts.hostname}{parts.path}"
        options: dict[str, Any] = {"timeout": f"{timeout_s}s", "connect_timeout": f"{timeout_s / 2}s"}
        if config.get("endpoint", "").startswith("http:"):
            options["allow_http"] = True
        try:
            self._store = S3Store(
                parts.hostname,
                prefix=parts.path.strip("/") or None,
                config=config,  # pyright: ignore[reportArgumentType]
                client_options=options,  # pyright: ignore[reportArgumentType]
                retry_config={"max_retries": 0},
            )
        except (obstore.exceptions.BaseError, ValueError, TypeError) as error:
            raise ConfigError(f"{self._where} cannot be used: {_first_line(error)}") from None
        self._room = Room(capacity_bytes, self.entries)

    def __repr__(self) -> str:
        return f"S3({self._where})"

    def put(self, keys: Sequence[bytes], values: Sequence[Value]) -> list[Outcome]:
        check_keys(keys)
        sizes = [size_of(v) for v in values]

        def store(at: Sequence[int]) -> list[Outcome]:
            out: list[Outcome] = [ABSENT] * len(keys)
            for i in at:
                out[i] = self._try(lambda i=i: self._put(keys[i], values[i], sizes[i]))
            return out

        return self._room.put(sizes, store, keys, self.lookup)

    def get(
        self, keys: Sequence[bytes], buffers: Sequence[memoryview], offsets: Sequence[int] | None = None
    ) -> list[Outcome]:
        check_keys(keys)
        items = zip(keys, buffers, offsets or [0] * len(keys), strict=True)
        return [self._try(lambda item=item: self._get(*item)) for item in items]

    def lookup(self, keys: Sequence[bytes]) -> list[Outcome]:
        check_keys(keys)
        return [self._try(lambda key=key: int(self._obstore.head(self._store, _path(key))["size"])) for key in keys]

    def delete(self, keys: Sequence[bytes]) -> list[Outcome]:
        out = self.lookup(keys)
        for i, key in enumerate(keys):
            if isinstance(out[i], int):
                gone = self._try(lambda key=key: self._obstore.delete(self._store, _path(key)) or 0)
                out[i] = gone if isinstance(gone, Miss) else out[i]
        self._room.freed(out)
        return out

    def entries(self) -> Iterator[Entry]:
        try:
            for page in self._obstore.list(self._store, chunk_size=1000):
                for found in page:
                    if key := _key(found["path"]):
                        yield Entry(key, int(found["size"]), found["last_modified"].timestamp())
        except self._obstore.exceptions.BaseError as error:
            raise self._failure(error) from None

    def usage(self) -> Usage:
        return self._room.usage()

    def close(self) -> None:
        """Nothing is held open between requests but idle connections, which go with the object."""

    def _put(self, key: bytes, value: Value, size: int) -> int:
        # Several empty pieces would become empty parts of an upload, which S3 refuses.
        pieces = [memoryview(piece).cast("B") for piece in value if len(piece)]
        self._obstore.put(self._store, _path(key), pieces if len(pieces) > 1 else pieces[0] if pieces else b"")
        return size

    def _get(self, key: bytes, buffer: memoryview, offset: int) -> Outcome:
        if not len(buffer):
            size = int(self._obstore.head(self._store, _path(key))["size"])
            return 0 if offset <= size else Miss("corrupt", f"offset {offset} of {size} bytes")
        data = self._obstore.get_range(self._store, _path(key), start=offset, end=offset + len(buffer))
        if len(data) != len(buffer):
            return Miss("corrupt", f"{len(data)} bytes of {len(buffer)}")
        buffer[:] = memoryview(data)
        return len(buffer)

    def _try(self, call: Callable[[], Outcome]) -> Outcome:
        try:
            return call()
        except FileNotFoundError:
            return ABSENT
        except PermissionError as error:
            return Miss("read_only", _first_line(error))
        except (self._obstore.exceptions.BaseError, OSError) as error:
            text = _first_line(error)
            if "status code: 416" in text:
                return Miss("corrupt", "the value ends before the range that was asked for")
            if FULL.search(str(error)):
                return Miss("full", text)
            return Miss("timeout" if isinstance(self._failure(error), TimeoutError) else "error", text)

    def _failure(self, error: Exception) -> OSError:
        kind = TimeoutError if TIMED_OUT.search(str(error)) else ConnectionError
        return kind(f"{self._where}: {_first_line(error)}")


def _path(key: bytes) -> str:
    name = key.hex()
    return f"{name[:2]}/{name}"


def _key(path: str) -> bytes | None:
    found = re.fullmatch(r"([0-9a-f]{2})/(\1[0-9a-f]{62})", path)
    return bytes.fromhex(found[2]) if found else None


def _first_line(error: Exception) -> str:
    # What follows is a dump of obstore's innards.
    return str(error).split("\n", 1)[0][:300]
