"""Stage `rans_smallest`: rANS with a table per row in the stream or with the shared bank, whichever is shorter.

Tables are made by compiled loops here: with a table per row, making them costs more than coding the symbols.
"""

import zlib
from functools import cached_property

import numba as nb
import numpy as np

from lmcache_blend.codecs import rans
from lmcache_blend.codecs.container import array, join, split
from lmcache_blend.codecs.entropy import SIZE, checked_size, inflate
from lmcache_blend.codecs.stages import EMPTY, NotCodable, Plane, Stage, register_stage
from lmcache_blend.codecs.tables import ESCAPE, MAP_SIZE, REACH, Tables, laplace_bank
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
        # 256, the frequency of a row's only symbol, does not fit a byte; no other row sums to 255.
        row = zlib.compress((freq - (freq == 256)).astype(np.uint8).tobytes())
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


class PlainTables(Tables):
    """Tables of single consecutive values: the look-up tables are made without a loop per table."""

    @cached_property
    def map(self) -> np.ndarray:
        out = np.full((len(self), MAP_SIZE), ESCAPE, np.uint8)
        first = self.values[0, 0, 0] + self.reach[0] if len(self) else 0
        out[:, first : first + ESCAPE] = np.where(self.freq[:, :ESCAPE] > 0, np.arange(ESCAPE), ESCAPE)
        return out

    @cached_property
    def lut(self) -> np.ndarray:
        return _fill(self.freq, self.bits)


def tables_from(freq: np.ndarray, first: int, bits: int, escape: np.ndarray | None = None) -> Tables:
    """Tables at width 1 from frequencies [n, A], A <= 255, of the values first, first + 1, ..., as they are.

    escape: [n], frequency of the escape, None for none. Raises ValueError unless each table sums to 2^bits.
    """
    n, size = freq.shape
    full = np.zeros((n, 256), np.uint16)
    full[:, :size] = freq
    full[:, ESCAPE] = 0 if escape is None else escape
    if (full.sum(1, dtype=np.int64) != 1 << bits).any():
        raise ValueError(f"a table's frequencies do not sum to {1 << bits}")
    values = np.zeros((n, 256, 4), np.int16)
    values[:, :size, 0] = np.arange(first, first + size)
    values[:, ESCAPE] = rans.MISSING
    reach = np.full(n, max(-first, first + size - 1), np.int16)
    return PlainTables(bits, np.ones(n, np.uint8), full, values, reach, np.zeros((n, 2 * REACH + 1), np.float32))


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


@nb.njit(nogil=True, cache=True)
def _fill(freq, bits):
    """Tables.lut: by slot, frequency - 1 (12 bits), slot - cum (12), symbol (8)."""
    out = np.empty((len(freq), 1 << bits), np.uint32)
    for i in range(len(freq)):
        at = 0
        for s in range(256):
            f = np.int64(freq[i, s])
            for k in range(f):
                out[i, at] = ((f - 1) << 20) | (k << 8) | s
                at += 1
    return out
