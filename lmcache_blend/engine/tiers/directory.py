"""What the processes that share one directory agree on: a lock, the bytes in use, and whose temporary files are dead.

The count is exact after any kill -9: a process sets `dirty` before it changes the directory and clears it, together
with the new count, afterwards; whoever takes the lock and finds it set counts anew. A temporary file is locked by the
process that writes it; one that can be locked has lost its writer and is deleted.
"""

import fcntl
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from lmcache_blend.engine.tiers.base import Entry

STATE = struct.Struct("<8sIIQQ")
MAGIC = b"LMCBDIR\n"
HEX = frozenset("0123456789abcdef")
FOREVER = 1 << 33
"""A pin without an end, as a file's time: the year 2242."""


class Count(NamedTuple):
    """Of the values in the directory."""

    nbytes: int
    chunks: int


class Directory:
    """root/chunks/ab/<key in hex>: values. root/tmp: being written. root/pins/<key>: pins, each until its file's time.

    Raises OSError where root cannot be made; where it cannot be written to, `writable` is False.
    """

    def __init__(self, root: Path):
        self.root, self.tmp, self.pins = root, root / "tmp", root / "pins"
        self._chunks = str(root / "chunks")
        self._mutex, self._recount_at = threading.Lock(), 0.0
        self._lock = self._state = -1
        try:
            for folder in (root / "chunks", self.tmp, self.pins):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._state = os.open(root / "state", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            self.close()
            if not (root / "chunks").is_dir():
                raise
        if self.writable:
            with self.locked():
                self.sweep()
                self.recount()

    @property
    def writable(self) -> bool:
        return self._state >= 0

    def path(self, key: bytes) -> str:
        name = key.hex()
        return f"{self._chunks}/{name[:2]}/{name}"

    def pin_path(self, key: bytes) -> Path:
        return self.pins / key.hex()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among all threads and processes. Raises OSError."""
        with self._mutex:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def count(self) -> Count:
        """Under the lock: what the directory holds.

        Counted anew where the last one to change it died, and now and then (a hundredth of the time), since files may
        also be deleted or cut by people.
        """
        raw = os.pread(self._state, STATE.size, 0)
        if time.monotonic() < self._recount_at and len(raw) == STATE.size:
            magic, _, dirty, nbytes, chunks = STATE.unpack(raw)
            if magic == MAGIC and not dirty and raw == _state(Count(nbytes, chunks), dirty):
                return Count(nbytes, chunks)
        return self.recount()

    def changing(self, before: Count) -> None:
        """Under the lock: the directory is about to change."""
        self._write(before, 1)

    def changed(self, after: Count) -> None:
        """Under the lock: the change is complete."""
        self._write(after, 0)

    def recount(self) -> Count:
        """Under the lock: count the files."""
        began = time.monotonic()
        sizes = [entry.nbytes for entry in self.entries()]
        now = time.monotonic()
        self._recount_at = now + 100 * (now - began)
        self._write(Count(sum(sizes), len(sizes)), 0)
        return Count(sum(sizes), len(sizes))

    def sweep(self) -> None:
        """Under the lock: delete what dead processes left behind."""
        for path in self.tmp.iterdir():
            with suppress(OSError):
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                finally:
                    os.close(fd)
        for path in self.pins.iterdir():
            if is_name(path.name) and not os.path.exists(self.path(bytes.fromhex(path.name))):
                path.unlink(missing_ok=True)

    def entries(self) -> Iterator[Entry]:
        """Every value; files that are none of ours are left out."""
        for folder in _scan(self._chunks):
            for file in _scan(folder.path):
                if is_name(file.name) and file.name.startswith(folder.name) and not file.is_dir(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        found = file.stat(follow_symlinks=False)
                        yield Entry(bytes.fromhex(file.name), found.st_size, found.st_mtime)

    def new_file(self) -> tuple[int, str]:
        """A temporary file, open and locked by this process until it is closed."""
        while True:
            path = f"{self.tmp}/{os.urandom(12).hex()}"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(fd).st_nlink:
                    return fd, path
            os.close(fd)  # someone swept it away before it was locked

    def close(self) -> None:
        with self._mutex:
            for fd in (self._lock, self._state):
                if fd >= 0:
                    os.close(fd)
            self._lock = self._state = -1

    def _write(self, count: Count, dirty: int) -> None:
        os.pwrite(self._state, _state(count, dirty), 0)


def _state(count: Count, dirty: int) -> bytes:
    """The shared state: magic, CRC-32 of what follows, dirty, bytes, chunks."""
    return STATE.pack(MAGIC, zlib.crc32(struct.pack("<IQQ", dirty, *count)), dirty, *count)


def is_name(name: str) -> bool:
    """Whether a file's name is a key in hex."""
    return len(name) == 64 and HEX.issuperset(name)


def _scan(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []
