"""The disk tier with its bytes moved by NIXL (https://github.com/ai-dynamo/nixl): nixl:///mnt/kv?backend=GDS_MT.

The backend POSIX works everywhere; GDS and GDS_MT need NVIDIA GPUDirect Storage. Directory, counts, pins and atomic
replacement are the disk tier's, so both may be used on one directory at once.
"""

import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from lmcache_blend.engine.tiers.base import Miss, Outcome, Value, register_tier
from lmcache_blend.engine.tiers.disk import DiskTier
from lmcache_blend.errors import ConfigError

BACKENDS = ("POSIX", "GDS", "GDS_MT")
NAMES = itertools.count()


@register_tier("nixl")
class Nixl(DiskTier):
    """Files below a directory, read and written by a NIXL backend. Raises ConfigError for a bad URL, without the
    package, or where the backend does not start. Parameters as the disk tier's."""

    def __init__(
        self,
        url: str,
        *,
        capacity_bytes: int | None = None,
        fsync: Literal["none", "data", "full"] = "none",
        threads: int = 2,
    ):
        parts = urlsplit(url)
        (backend,) = parse_qs(parts.query).get("backend", ["POSIX"])
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or backend not in BACKENDS:
            raise ConfigError(f"{url!r} is no nixl:///folder?backend={'|'.join(BACKENDS)}")
        try:
            from nixl._api import nixl_agent, nixl_agent_config  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(f"a nixl:// tier needs NIXL: pip install lmcache-blend[nixl] ({error})") from None
        self._backend = backend
        self._agent: Any = nixl_agent(f"lmcache-blend-{os.getpid()}-{next(NAMES)}", nixl_agent_config(backends=[]))
        try:
            self._agent.create_backend(backend)
        except Exception as error:
            raise ConfigError(f"NIXL's backend {backend} does not start here: {error}") from None
        super().__init__(unquote(parts.path), capacity_bytes=capacity_bytes, fsync=fsync, threads=threads)

    def _write(self, fd: int, value: Value) -> None:
        self._transfer("WRITE", fd, [memoryview(part).cast("B") for part in value if len(part)], 0)

    def _get(self, key: bytes, buffer: memoryview, offset: int, reached: Callable[[int], int] | None = None) -> Outcome:
        fd = os.open(self._directory.path(key), os.O_RDWR if self._backend != "POSIX" else os.O_RDONLY)
        try:
            # A backend says no more of a file that is too short than that the transfer failed.
            if (size := os.fstat(fd).st_size) < offset + buffer.nbytes:
                return Miss("corrupt", f"the file ends {offset + buffer.nbytes - size} bytes early")
            if reached is not None:
                reached(0)
            self._transfer("READ", fd, [buffer] if buffer.nbytes else [], offset)
            if reached is not None:
                reached(buffer.nbytes)
            return buffer.nbytes
        finally:
            os.close(fd)

    def _transfer(self, way: str, fd: int, pieces: Sequence[memoryview], offset: int) -> None:
        """Between memory and consecutive bytes of a file. Raises OSError."""
        if not pieces:
            return
        memory = [(np.frombuffer(piece, np.uint8).ctypes.data, len(piece), 0, "") for piece in pieces]
        starts = itertools.accumulate((len(piece) for piece in pieces), initial=offset)
        file = [(start, len(piece), fd, "") for start, piece in zip(starts, pieces, strict=False)]
        agent, backends, registered, handle = self._agent, [self._backend], [], None
        try:
            registered.append(agent.register_memory(memory, "DRAM", backends=backends))
            registered.append(agent.register_memory(file, "FILE", backends=backends))
            both = [found.trim() for found in registered]
            handle = agent.initialize_xfer(way, *both, agent.name, backends=backends)
            state, wait = agent.transfer(handle), 2e-5
            while state == "PROC":
                time.sleep(wait)
                wait = min(2 * wait, 1e-3)
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                raise OSError(f"NIXL's transfer ended as {state}")
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"NIXL's transfer failed: {type(error).__name__}: {error}") from None
        finally:
            if handle is not None:
                agent.release_xfer_handle(handle)
            for found in registered:
                agent.deregister_memory(found)
