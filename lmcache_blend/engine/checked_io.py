"""Files read and written with their checksums in one call, during which other threads of Python run.

Reading and checking a layer takes less time than a thread may wait for the interpreter to go on, so a chunk is not
moved layer by layer from Python. Each piece is hashed while the processor's cache holds it. The hash is that of the
library behind `xxhash`; where that does not give it to others, or hashes differently, `AVAILABLE` is False, and
whatever fails here is done again from Python, which finds the system's error.
"""

import ctypes
import platform
import sys
from typing import Any

import numba
import numpy as np
import xxhash
import xxhash._xxhash
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

PIECE = 1 << 18
"""Bytes that are read and hashed at a time; they stay in the cache in between."""
BLOCK = 1 << 19
"""Written at a time, at multiples of it: the system then takes large pages for its cache, which is faster by a quarter
than writing what lies a little beside them, and is read faster as well."""
VECTOR = 1000
"""Pieces of memory that one call writes at most; IOV_MAX is 1024."""

CALLS = ("XXH3_createState", "XXH3_freeState", "XXH3_128bits_reset", "XXH3_128bits_update", "XXH3_128bits_digest")
DISPATCH = "XXH3_128bits_update_dispatch"
"""The same as XXH3_128bits_update with what this processor has beyond the oldest of its kind, twice as fast or more;
where the library has it."""


@intrinsic
def _call(typing_context: Any, address: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """int64 f(int64 a, b, c, d) of the C function at that address; one with fewer parameters does not see the rest."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word] * 4).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], kind), arguments[1:])

    return types.int64(*[types.int64] * 5), codegen


@intrinsic
def _digest(typing_context: Any, address: Any, state: Any) -> Any:
    """(low, high) of the state; a struct of two words comes back in two registers."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.LiteralStructType([word, word]), [word]).as_pointer()
        both = builder.call(builder.inttoptr(arguments[0], kind), arguments[1:])
        return cgutils.pack_array(builder, [builder.extract_value(both, i) for i in (0, 1)])

    return types.UniTuple(types.uint64, 2)(types.int64, types.int64), codegen


@numba.njit("int64(int64[::1], int64, int64, int64, int64[:, ::1], uint64[:, ::1])", nogil=True, cache=True)
def _read(calls: np.ndarray, fd: int, base: int, there: int, spans: np.ndarray, digests: np.ndarray) -> int:
    """See `read`."""
    create, free, reset, update, digest, pread = calls[0], calls[1], calls[2], calls[3], calls[4], calls[5]
    state = _call(create, 0, 0, 0, 0)  # pyright: ignore[reportCallIssue]
    if state == 0:
        return there
    for row in range(len(spans)):
        start, end = spans[row]
        _call(reset, state, 0, 0, 0)  # pyright: ignore[reportCallIssue]
        for at in range(start, end, PIECE):
            until = min(at + PIECE, end)
            while there < until:
                n = _call(pread, fd, base + there, until - there, there)  # pyright: ignore[reportCallIssue]
                if n <= 0:
                    _call(free, state, 0, 0, 0)  # pyright: ignore[reportCallIssue]
                    return there
                there += n
            _call(update, state, base + at, until - at, 0)  # pyright: ignore[reportCallIssue]
        digests[row, 1], digests[row, 0] = _digest(digest, state)  # pyright: ignore[reportCallIssue]
    _call(free, state, 0, 0, 0)  # pyright: ignore[reportCallIssue]
    return there


@numba.njit("boolean(int64[::1], int64, int64[:, ::1], uint64[:, ::1])", nogil=True, cache=True)
def _write(calls: np.ndarray, fd: int, pieces: np.ndarray, digests: np.ndarray) -> bool:
    """See `write`."""
    create, free, reset, update, digest, pwritev = calls[0], calls[1], calls[2], calls[3], calls[4], calls[6]
    state, good = _call(create, 0, 0, 0, 0), True  # pyright: ignore[reportCallIssue]
    if state == 0:
        return False
    vector = np.empty((VECTOR, 2), np.int64)
    count = filled = offset = 0
    current = -1
    for row in range(len(pieces)):
        segment, address, left = pieces[row]
        if segment >= 0 and segment != current:
            if current >= 0:
                digests[current, 1], digests[current, 0] = _digest(digest, state)  # pyright: ignore[reportCallIssue]
            _call(reset, state, 0, 0, 0)  # pyright: ignore[reportCallIssue]
            current = segment
        while good and left > 0:
            size = min(left, BLOCK - (offset + filled) % BLOCK)
            if segment >= 0:
                _call(update, state, address, size, 0)  # pyright: ignore[reportCallIssue]
            vector[count] = address, size
            count, filled, address, left = count + 1, filled + size, address + size, left - size
            if count == VECTOR or (offset + filled) % BLOCK == 0:
                good = _call(pwritev, fd, vector.ctypes.data, count, offset) == filled  # pyright: ignore[reportCallIssue]
                count, filled, offset = 0, 0, offset + filled
    if good and count:
        good = _call(pwritev, fd, vector.ctypes.data, count, offset) == filled  # pyright: ignore[reportCallIssue]
    if current >= 0:
        digests[current, 1], digests[current, 0] = _digest(digest, state)  # pyright: ignore[reportCallIssue]
    _call(free, state, 0, 0, 0)  # pyright: ignore[reportCallIssue]
    return good


def read(fd: int, base: int, there: int, spans: np.ndarray) -> tuple[int, list[bytes]]:
    """Fill memory at address `base` from a file, as far as spans reach, and hash them.

    there: bytes from the start that are in memory already. spans: [N, 2] int64, start and end, none beyond the memory.
    Bytes that are there then, and XXH3-128 of each span; only where they are at least all that spans cover, those hold.
    """
    digests = np.empty((len(spans), 2), np.uint64)
    there = _read(_calls, fd, base, there, spans, digests)
    return there, _bytes(digests)


def write(fd: int, segments: int, pieces: np.ndarray) -> list[bytes] | None:
    """Write memory to a file from its start; XXH3-128 of each segment, or None where something failed.

    pieces: [N, 3] int64, one behind the other in the file: number of the segment, ascending, or -1 for what belongs to
    none; address; bytes.
    """
    digests = np.empty((segments, 2), np.uint64)
    return _bytes(digests) if _write(_calls, fd, pieces, digests) else None


def _bytes(digests: np.ndarray) -> list[bytes]:
    raw = digests.byteswap().tobytes()
    return [raw[i : i + 16] for i in range(0, len(raw), 16)]


def _addresses() -> np.ndarray | None:
    """Of the C functions; None where they are not to be had."""
    if platform.machine() not in ("x86_64", "aarch64") or sys.platform != "linux":
        return None
    try:
        hashing, system = ctypes.CDLL(xxhash._xxhash.__file__), ctypes.CDLL(None)
        found = [getattr(hashing, name) for name in CALLS] + [system.pread, system.pwritev]
        found[3] = getattr(hashing, DISPATCH, found[3])
    except (AttributeError, OSError):
        return None
    return np.array([ctypes.cast(f, ctypes.c_void_p).value for f in found], np.int64)


_found = _addresses()
_calls = np.zeros(len(CALLS) + 2, np.int64) if _found is None else _found


def _hashes_alike() -> bool:
    """Whether the hash is the one that `xxhash` computes: of nothing, and of several pieces."""
    sample = np.arange(PIECE + 1, dtype=np.uint32).view(np.uint8)
    spans = np.array([(0, 0), (3, 100), (5, sample.size)], np.int64)
    there, digests = read(-1, sample.ctypes.data, sample.size, spans)
    return there == sample.size and digests == [xxhash.xxh3_128_digest(sample[a:b].data) for a, b in spans]


AVAILABLE = _found is not None and _hashes_alike()
