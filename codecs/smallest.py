"""Stage `rans_smallest`: rANS with a table per row in the stream or with the shared bank, whichever is shorter.

Tables are made by compiled loops here: with a table per row, making them costs more than coding the symbols.
"""

import zlib

import numba as nb
import numpy as np

from lmcache_blend.codecs import rans
from lmcache_blend.codecs.container import array, join, split
from lmcache_blend.codecs.entropy import SIZE, checked_size, inflate
from lmcache_blend.codecs.stages import EMPTY, NotCodable, Plane, Stage, register_stage
from lmcache_blend.codecs.tables import REACH, byte_frequencies, laplace_bank, tables_from
from lmcache_blend.errors import CorruptChunkError

BANK, ROW = b"\0", b"\1"
LARGEST_SYMBOL = 254
ROW_BITS = 8


@register_stage("rans_smallest")
class RansSmallest(Stage):
    """Symbols 0..254: an exact 8-bit table per row, or the shared bank around each row's median; a byte says which.

    Tables per row pay on long chunks and on rows with more than one peak.
    """

    def encode(self, x: np.ndarray, plane: Plane) -> tuple[np.ndarray, bytes]:
        if x.size and not 0 <= x.min() <= x.max() <= LARGEST_SYMBOL:
            raise NotCodable
        counts = _count(np.ascontiguousarray(x))
        centre, around = _centre(counts)
        cost = around @ laplace_bank().cost.T
        ids = np.argmin(cost, 1).astype(np.uint8)
        bank = zlib.compress(centre.tobytes() + ids.tobytes())

        present = counts[:, : int(x.max(initial=0)) + 1]
        freq = _normalise(present, 1 << ROW_BITS)
        row = zlib.compress(byte_frequencies(freq).tobytes())
        row_bits = float((present * (ROW_BITS - np.log2(np.maximum(freq, 1)))).sum())

        size = SIZE.pack(*x.shape)
        if row_bits + 8 * len(row) < float(cost.min(1).sum()) + 8 * len(bank):
            return EMPTY, ROW + join([size, row, rans.encode(x, np.arange(len(x)), tables_from(freq, 0, ROW_BITS))])
        return EMPTY, BANK + join([size, bank, rans.encode(x - centre.reshape(-1, 1), ids, laplace_bank())])

    def decode(self, y: np.ndarray, side: memoryview, plane: Plane) -> np.ndarray:
        kind = bytes(side[:1])
        size, packed, stream = split(side[1:], 3)
        rows, length = checked_size(size, plane)
        if kind == ROW:
            freq = np.frombuffer(inflate(packed, 255 * rows), np.uint8)
            if not rows or not len(freq) or len(freq) % rows:
                raise CorruptChunkError(f"tables of {len(freq)} bytes are not of one size for {rows} rows")
            return rans.decode_exact(stream, freq.reshape(rows, -1), length)
        if kind != BANK:
            raise CorruptChunkError(f"symbols start with {kind!r}, which names no kind of table")
        centre, ids = array(inflate(packed, 2 * rows), "u1", (2, rows))
        return rans.decode(stream, ids, length, laplace_bank()) + centre[:, None].astype(np.int16)


@nb.njit(nogil=True, cache=True)
def _centre(counts):
    """Counts [R, 255] of 0..254 -> each row's median [R] uint8, and counts [R, 255] float32 of -127..127 around it.

    Values further out are counted at the ends, where they cost an escape.
    """
    centre, around = np.zeros(len(counts), np.uint8), np.zeros((len(counts), 2 * REACH + 1), np.float32)
    for r in range(len(counts)):
        below, half, middle = 0, (counts[r].sum() + 1) // 2, 0
        while below + counts[r, middle] < half:
            below += counts[r, middle]
            middle += 1
        centre[r] = middle
        for s in range(LARGEST_SYMBOL + 1):
            around[r, min(max(s - middle, -REACH), REACH) + REACH] += counts[r, s]
    return centre, around


@nb.njit(nogil=True, cache=True)
def _count(x):
    """[R, T] symbols 0..254 -> [R, 255] int64, how often each occurs in its row."""
    out = np.zeros((x.shape[0], 255), np.int64)
    for r in range(x.shape[0]):
        for t in range(x.shape[1]):
            out[r, x[r, t]] += 1
    return out


@nb.njit(nogil=True, cache=True)
def _normalise(counts, total):
    """Counts [R, A] to frequencies [R, A] uint16 that sum to `total`, at least 1 for what occurs (tables.normalise)."""
    out = np.zeros(counts.shape, np.uint16)
    for r in range(len(counts)):
        used = np.flatnonzero(counts[r])
        if len(used) == 0:
            out[r, 0] = total
            continue
        n = counts[r][used]
        freq = np.maximum(1, n * total // n.sum())
        left = total - freq.sum()
        step = 1 if left > 0 else -1
        gain = np.empty(len(used))
        for i in range(len(used)):
            gain[i] = _gain(n[i], freq[i], step)
        for _ in range(abs(left)):
            i = np.argmax(gain)
            freq[i] += step
            gain[i] = _gain(n[i], freq[i], step)
        out[r, used] = freq
    return out


@nb.njit(nogil=True, cache=True)
def _gain(n, freq, step):
    """Nats that a frequency of one more saves, or one of one less costs, on n symbols; none may reach 0."""
    return n * np.log((freq + step) / freq) if freq + step > 0 else -np.inf
