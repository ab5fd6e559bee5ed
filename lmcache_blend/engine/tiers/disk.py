"""The tier on disk: one file a chunk, written aside and put in place at once; any number of processes share it."""

import errno
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

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
from lmcache_blend.engine.tiers.directory import FOREVER, Count, Directory, is_name

MAX_PIECES = 1000  # IOV_MAX is 1024
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EBADF}
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


@register_tier("disk")
class DiskTier:
    """Files below a directory, shared by any number of processes, none of which leaves anything behind when killed.

    path: made where it is missing; on a read-only one everything is read and nothing stored. capacity_bytes: of all
    processes together. fsync: "none" leaves writing to the system (a cache is disposable, and its checksums tell a
    torn file), "data" syncs each file before it gets its name, "full" its folder as well. threads: of one engine.
    """

    def __init__(
        self,
        path: str | Path,
        capacity_bytes: int | None = None,
        fsync: Literal["none", "data", "full"] = "none",
        threads: int = 4,
    ):
        self.capacity_bytes, self.fsync, self.threads = capacity_bytes, fsync, threads
        self._directory = Directory(Path(path))

    def put(self, keys: Sequence[bytes], values: Sequence[Value]) -> list[Outcome]:
        check_keys(keys)
        out = [self._guarded(self._put, key, value) for key, value in zip(keys, values, strict=True)]
        return [Miss("error", "the tier's directory is gone") if o == ABSENT else o for o in out]

    def _put(self, key: bytes, value: Value) -> Outcome:
        size = size_of(value)
        if not self._directory.writable:
            return Miss("read_only")
        if self.capacity_bytes is not None and size > self.capacity_bytes:
            return Miss("too_large", f"{size} bytes do not fit into {self.capacity_bytes}")
        fd, path = self._directory.new_file()
        try:
            if not self._room(key, size):
                return Miss("full")
            self._write(fd, value)
            if self.fsync != "none":
                os.fdatasync(fd)
            out = self._place(key, path, size)
            path = path if isinstance(out, Miss) else ""
            return out
        except OSError as error:
            if error.errno in NO_ROOM:
                return Miss("full", "the disk is full")
            raise
        finally:
            if path:
                with suppress(OSError):
                    os.unlink(path)
            os.close(fd)

    def _write(self, fd: int, value: Value) -> None:
        _write(fd, value)

    def _room(self, key: bytes, size: int) -> bool:
        """Before anything is written: whether it would fit now."""
        if self.capacity_bytes is None:
            return True
        with self._directory.locked():
            return (
                self._directory.count().nbytes - max(_size(self._directory.path(key)), 0) + size <= self.capacity_bytes
            )

    def _place(self, key: bytes, path: str, size: int) -> Outcome:
        target = self._directory.path(key)
        with self._directory.locked():
            count = self._directory.count()
            old = _size(target)
            after = Count(count.nbytes - max(old, 0) + size, count.chunks + (old < 0))
            if self.capacity_bytes is not None and after.nbytes > self.capacity_bytes:
                return Miss("full")
            self._directory.changing(count)
            try:
                os.replace(path, target)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.replace(path, target)
            self._directory.changed(after)
        if self.fsync == "full":
            _sync_folder(os.path.dirname(target))
        return size

    def get(
        self, keys: Sequence[bytes], buffers: Sequence[memoryview], offsets: Sequence[int] | None = None
    ) -> list[Outcome]:
        check_keys(keys)
        items = zip(keys, buffers, offsets or [0] * len(keys), strict=True)
        return [self._guarded(self._get, *item) for item in items]

    def get_stepwise(
        self, keys: Sequence[bytes], buffers: Sequence[memoryview], reached: Sequence[Callable[[int], int]]
    ) -> list[Outcome]:
        check_keys(keys)
        items = zip(keys, buffers, [0] * len(keys), reached, strict=True)
        return [self._guarded(self._get, *item) for item in items]

    def _get(self, key: bytes, buffer: memoryview, offset: int, reached: Callable[[int], int] | None = None) -> Outcome:
        fd = os.open(self._directory.path(key), os.O_RDONLY | os.O_CLOEXEC)
        try:
            done, until = 0, buffer.nbytes if reached is None else reached(0)
            pull = getattr(reached, "pull", None) if offset == 0 else None
            while done < buffer.nbytes:
                n = os.preadv(fd, [buffer[done:until]], offset + done)
                if n == 0:
                    return Miss("corrupt", f"the file ends {buffer.nbytes - done} bytes early")
                done += n
                if reached is not None:
                    until = reached(done)
                    if pull is not None and done < buffer.nbytes and (now := pull(fd, done)) > done:
                        done, until = now, reached(now)
            if offset == 0:
                # So that a restart knows what was used last; no reason to fail where it is not allowed.
                with suppress(OSError):
                    os.utime(fd)
            return done
        finally:
            os.close(fd)

    def lookup(self, keys: Sequence[bytes]) -> list[Outcome]:
        check_keys(keys)
        path, stat, out = self._directory.path, os.stat, []
        for key in keys:
            try:
                out.append(stat(path(key)).st_size)
            except FileNotFoundError:
                out.append(ABSENT)
        return out

    def delete(self, keys: Sequence[bytes]) -> list[Outcome]:
        check_keys(keys)
        return [self._guarded(self._delete, key) for key in keys]

    def _delete(self, key: bytes) -> Outcome:
        path = self._directory.path(key)
        if not self._directory.writable:
            return Miss("read_only") if _size(path) >= 0 else ABSENT
        with self._directory.locked():
            size = _size(path)
            if size < 0:
                return ABSENT
            if self._until(key) > time.time():
                return Miss("pinned")
            count = self._directory.count()
            self._directory.changing(count)
            os.unlink(path)
            self._directory.pin_path(key).unlink(missing_ok=True)
            self._directory.changed(Count(count.nbytes - size, count.chunks - 1))
        return size

    def entries(self) -> Iterator[Entry]:
        return self._directory.entries()

    def usage(self) -> Usage:
        if not self._directory.writable:
            sizes = [entry.nbytes for entry in self.entries()]
            return Usage(sum(sizes), len(sizes), self.capacity_bytes)
        with self._directory.locked():
            return Usage(*self._directory.count(), self.capacity_bytes)

    def close(self) -> None:
        self._directory.close()

    # A pin is an empty file whose time of modification is the pin's end: there is nothing in it to parse.

    def pin(self, keys: Sequence[bytes], until: float) -> list[Outcome]:
        check_keys(keys)
        return [self._guarded(self._pin, key, min(max(until, 0.0), FOREVER)) for key in keys]

    def _pin(self, key: bytes, until: float) -> Outcome:
        if not self._directory.writable:
            return Miss("read_only")
        with self._directory.locked():
            size = _size(self._directory.path(key))
            if size < 0:
                return ABSENT
            until = max(until, self._until(key))
            self._directory.pin_path(key).touch()
            os.utime(self._directory.pin_path(key), (until, until))
            return size

    def unpin(self, keys: Sequence[bytes]) -> list[Outcome]:
        check_keys(keys)
        return [self._guarded(self._unpin, key) for key in keys]

    def _unpin(self, key: bytes) -> Outcome:
        if not self._directory.writable:
            return Miss("read_only")
        with self._directory.locked():
            held = self._until(key) > time.time()
            self._directory.pin_path(key).unlink(missing_ok=True)
            size = _size(self._directory.path(key))
            return size if held and size >= 0 else ABSENT

    def pinned(self) -> dict[bytes, float]:
        out, now = {}, time.time()
        for name in os.listdir(self._directory.pins):
            if is_name(name):
                key = bytes.fromhex(name)
                if (until := self._until(key)) > now:
                    out[key] = until
        return out

    def _until(self, key: bytes) -> float:
        try:
            until = os.stat(self._directory.pin_path(key)).st_mtime
        except FileNotFoundError:
            return 0.0
        return math.inf if until >= FOREVER else until

    @staticmethod
    def _guarded(call, *arguments) -> Outcome:
        """One key's OSError is that key's Miss."""
        try:
            return call(*arguments)
        except FileNotFoundError:
            return ABSENT
        except OSError as error:
            if error.errno in READ_ONLY:
                return Miss("read_only", str(error))
            return Miss("full" if error.errno in NO_ROOM else "error", str(error))


def _size(path: str) -> int:
    """-1 where there is no such file."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return -1


def _write(fd: int, value: Value) -> None:
    scattered = getattr(value, "scattered", None)
    if scattered is None:
        _write_at(fd, value, 0)
        return
    push = getattr(value, "push", None)
    if push is not None and push(fd):
        return
    os.ftruncate(fd, size_of(value))
    for offset, pieces in scattered():
        _write_at(fd, pieces, offset)


def _write_at(fd: int, value: Value, offset: int) -> None:
    pieces = [memoryview(part).cast("B") for part in value if len(part)]
    while pieces:
        done = os.pwritev(fd, pieces[:MAX_PIECES], offset)
        offset += done
        at = 0
        while at < len(pieces) and done >= len(pieces[at]):
            done -= len(pieces[at])
            at += 1
        del pieces[:at]
        if done:
            pieces[0] = pieces[0][done:]


def _sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
