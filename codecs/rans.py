"""32-lane interleaved range asymmetric numeral system (rANS): symbols to bytes and back.

State and stream follow Giesen, "Interleaved entropy coders" (arXiv 1402.3392): 32-bit states, 16-bit words, one word
stream that all lanes share in decoding order, tables of at most 12 bits. Rows are coded one after another, each with a
table of its own choice; within a row symbol i belongs to lane i % 32, and the states go on from row to row. A table may
code tuples of 2 or 4 neighbouring values at once, which makes both the stream of rare non-zero values shorter and the
decoder faster. Values that a table has no symbol for are escapes, kept as int16 behind the words.

    words u32 | escapes u32 | states 32 x u32 | words x u16 | escapes x i16      (little endian)

The numba kernels release the GIL; rans_avx2.py has the decoder's inner loop for processors with AVX2;
`decode_reference` is the same decoder in plain numpy.
"""

import struct

import numba as nb
import numpy as np

from lmcache_blend.codecs import rans_avx2
from lmcache_blend.codecs.rans_avx2 import SPREAD
from lmcache_blend.codecs.tables import ESCAPE, MISSING, MISSING_BYTE, Tables
from lmcache_blend.errors import CorruptChunkError

LANES, LOW = 32, 1 << 16
HEAD = struct.Struct("<II")
BYTE_VALUES = np.arange(256).astype(np.int8).astype(np.int16)
"""The value in the low byte of Tables.direct."""
BYTE_VALUES[MISSING_BYTE] = MISSING


def encode(q: np.ndarray, ids: np.ndarray, tables: Tables) -> bytes:
    """q: [R, T] int16 in [-32767, 32767]. ids: [R] number of each row's table."""
    out = np.zeros((q.shape[0], -(-q.shape[1] // 4) * 4), np.int16)
    out[:, : q.shape[1]] = q
    return encode_rows(out.ravel(), np.full(len(q), q.shape[1]), ids, tables)


def decode(data: bytes | memoryview, ids: np.ndarray, length: int, tables: Tables) -> np.ndarray:
    """What `encode` coded: [R, length] int16. Raises CorruptChunkError."""
    flat = decode_rows(data, np.full(len(ids), length), ids, tables)
    return flat.reshape(len(ids), -(-length // 4) * 4)[:, :length]


def row_starts(lengths: np.ndarray) -> np.ndarray:
    """[R + 1]: where rows of these lengths start in a flat array; each row starts at a multiple of 4."""
    return np.concatenate(([0], np.cumsum(-(-np.asarray(lengths, np.int64) // 4) * 4)))


def encode_rows(q: np.ndarray, lengths: np.ndarray, ids: np.ndarray, tables: Tables) -> bytes:
    """Rows of different lengths [R] in one flat int16 array, each from `row_starts` on, with zeros between them."""
    starts, lengths = row_starts(lengths), np.asarray(lengths, np.int64)
    symbols, escapes = np.empty(len(q), np.uint8), np.empty(len(q), np.int16)
    count = _index(q, starts, lengths, ids, tables.width, tables.reach, tables.map, symbols, escapes)
    words = np.empty(len(q) + 1, np.uint16)
    start, states = _encode(symbols, starts, lengths, ids, tables.width, tables.freq, tables.cum, tables.bits, words)
    used = words[start:]
    head = HEAD.pack(len(used), count)
    return (
        head + states.astype("<u4").tobytes() + used.astype("<u2").tobytes() + escapes[:count].astype("<i2").tobytes()
    )


def decode_rows(data: bytes | memoryview, lengths: np.ndarray, ids: np.ndarray, tables: Tables) -> np.ndarray:
    """What `encode_rows` coded: the flat int16 array; undefined between the rows. Raises CorruptChunkError."""
    words, states, escapes = _parse(data)
    _check_ids(ids, tables)
    starts, lengths = row_starts(lengths), np.asarray(lengths, np.int64)
    out = np.empty(starts[-1], np.int16)
    padded = np.concatenate((words, np.zeros(LANES, np.uint16)))
    t = tables
    used = _decode(padded, len(words), states, starts, lengths, ids, t.width, t.direct, t.values, SPREAD, t.bits, out)
    _check_end(int(used), len(words), states)
    if _fill(out, starts, lengths, ids, tables.width, escapes) != len(escapes):
        raise CorruptChunkError("the number of escaped values does not fit the symbols")
    return out


def decode_exact(data: bytes | memoryview, freq: np.ndarray, length: int) -> np.ndarray:
    """What `encode` coded with `tables.exact` at 8 bits: [R, length] int16, without a table in memory for every row.

    freq: [R, A] uint8, frequencies of the values 0..A-1; a row's only value has 255 for 256. Raises CorruptChunkError.
    """
    total = freq.sum(1, dtype=np.int64)
    if not ((total == 256) | ((total == 255) & (freq.max(1, initial=0) == 255))).all():
        raise CorruptChunkError("a table's frequencies do not sum to 256")
    words, states, escapes = _parse(data)
    out = np.empty((len(freq), length), np.int16)
    padded = np.concatenate((words, np.zeros(LANES, np.uint16)))
    used = _decode_exact(padded, len(words), states, freq, length, SPREAD, out)
    _check_end(int(used), len(words), states)
    if len(escapes):
        raise CorruptChunkError("a stream with exact tables has no escapes")
    return out


def decode_reference(data: bytes | memoryview, ids: np.ndarray, length: int, tables: Tables) -> np.ndarray:
    """`decode` in plain numpy, for tests: 32 lanes a step, hundreds of times slower."""
    words, states, escapes = _parse(data)
    _check_ids(ids, tables)
    out = np.zeros((len(ids), -(-length // 4) * 4), np.int16)
    x, at, mask = states.astype(np.uint64), 0, (1 << tables.bits) - 1
    for row, table in enumerate(ids):
        width = int(tables.width[table])
        for first in range(0, -(-length // width), LANES):
            n = min(LANES, -(-length // width) - first)
            slot = (x[:n] & np.uint64(mask)).astype(np.int64)
            symbol = tables.lut[table][slot] & 255
            freq, cum = tables.freq[table].astype(np.uint64)[symbol], tables.cum[table].astype(np.uint64)[symbol]
            x[:n] = freq * (x[:n] >> np.uint64(tables.bits)) + slot.astype(np.uint64) - cum
            low = np.flatnonzero(x[:n] < LOW)
            if at + len(low) > len(words):
                raise CorruptChunkError("the symbols run past the end of their words")
            x[low] = (x[low] << np.uint64(16)) | words[at : at + len(low)]
            at += len(low)
            out[row, first * width : (first + n) * width] = tables.values[table, symbol, :width].ravel()
    _check_end(at, len(words), x)
    lengths = np.full(len(ids), length)
    if _fill(out.reshape(-1), row_starts(lengths), lengths, ids, tables.width, escapes) != len(escapes):
        raise CorruptChunkError("the number of escaped values does not fit the symbols")
    return out[:, :length]


def _parse(data: bytes | memoryview) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    at = HEAD.size + 4 * LANES
    if len(data) < at:
        raise CorruptChunkError(f"{len(data)} bytes are too short for a rANS stream")
    words, escapes = HEAD.unpack_from(data)
    if len(data) != at + 2 * words + 2 * escapes:
        raise CorruptChunkError(f"{words} words and {escapes} escapes do not fit a rANS stream of {len(data)} bytes")
    states = np.frombuffer(data, "<u4", LANES, HEAD.size).astype(np.uint32)
    return (
        np.frombuffer(data, "<u2", words, at).astype(np.uint16),
        states,
        np.frombuffer(data, "<i2", escapes, at + 2 * words).astype(np.int16),
    )


def _check_ids(ids: np.ndarray, tables: Tables) -> None:
    if len(ids) and int(ids.max()) >= len(tables):
        raise CorruptChunkError(f"table {int(ids.max())} of {len(tables)} does not exist")


def _check_end(used: int, words: int, states: np.ndarray) -> None:
    if used != words or (states != LOW).any():
        raise CorruptChunkError("the rANS stream does not end where it should: wrong bytes or wrong tables")


@nb.njit(nogil=True, cache=True)
def _index(q, starts, lengths, ids, width, reach, maps, symbols, escapes):
    """Values to symbols, in the first ceil(length / width) places of each row; returns how many escape."""
    count = 0
    for r in range(len(ids)):
        w, m, table, first = width[ids[r]], reach[ids[r]], maps[ids[r]], starts[r]
        base = 2 * m + 1
        for j in range((lengths[r] + w - 1) // w):
            code, inside = 0, True
            for i in range(w):
                v = np.int64(q[first + j * w + i])
                inside &= -m <= v <= m
                code = code * base + v + m
            s = table[code] if inside else np.uint8(ESCAPE)
            symbols[first + j] = s
            if s == ESCAPE:
                for i in range(w):
                    escapes[count] = q[first + j * w + i]
                    count += 1
    return count


@nb.njit(nogil=True, cache=True)
def _encode(symbols, starts, lengths, ids, width, freqs, cums, bits, words):
    """Backwards over all rows; the words fill the buffer from its end. Returns where they start, and the states."""
    x, at = np.full(32, np.uint32(LOW)), len(words)
    shift, top = np.uint32(bits), np.uint32(32 - bits)
    inverse = np.empty(256, np.float64)
    for r in range(len(ids) - 1, -1, -1):
        freq, cum = freqs[ids[r]], cums[ids[r]]
        for s in range(256):
            inverse[s] = 1.0 / max(1, freq[s])
        w = width[ids[r]]
        for j in range((lengths[r] + w - 1) // w - 1, -1, -1):
            s, v = symbols[starts[r] + j], x[j & 31]
            f = np.uint32(freq[s])
            if (v >> top) >= f:
                at -= 1
                words[at] = v & np.uint32(0xFFFF)
                v >>= np.uint32(16)
            # floor(v / f): with the half added, the rounding error of the product is far from the next integer.
            d = np.uint32((v + 0.5) * inverse[s])
            x[j & 31] = (d << shift) + (v - d * f) + np.uint32(cum[s])
    return at, x


@nb.njit(nogil=True, cache=True, boundscheck=False, inline="always")
def _step(x, i, lut, mask, shift, words, at):
    """Decode one symbol of lane i; returns it and the place of the next word."""
    e = lut[x[i] & mask]
    s = ((e >> np.uint32(20)) + np.uint32(1)) * (x[i] >> shift) + ((e >> np.uint32(8)) & np.uint32(4095))
    more = (s << np.uint32(16)) | np.uint32(words[at])  # read in any case: a select, not a branch
    need = s < np.uint32(65536)
    x[i] = more if need else s
    return e & np.uint32(255), at + np.int64(need)


@nb.njit(nogil=True, cache=True, boundscheck=False)
def _portable_blocks(words, at, count, x, lut, values, spread, bits, width, blocks, out):
    """`rans_avx2.decode_blocks` for any processor."""
    mask, shift = np.uint32((1 << bits) - 1), np.uint32(bits)
    # The loops of 32 have a fixed length so that they unroll: 1.6 times the speed.
    for b in range(blocks):
        if at > count:
            return np.int64(-1)
        if width <= 1:
            part = out[b * 32 : b * 32 + 32]
            for i in range(32):
                k, at = _step(x, i, lut, mask, shift, words, at)
                part[i] = k if width == 0 else BYTE_VALUES[k]
        elif width == 2:
            part = out[b * 64 : b * 64 + 64]
            for i in range(32):
                k, at = _step(x, i, lut, mask, shift, words, at)
                part[2 * i] = values[k, 0]
                part[2 * i + 1] = values[k, 1]
        else:
            part = out[b * 128 : b * 128 + 128]
            for i in range(32):
                k, at = _step(x, i, lut, mask, shift, words, at)
                for place in range(4):
                    part[4 * i + place] = values[k, place]
    return at


_blocks = rans_avx2.decode_blocks if rans_avx2.available() else _portable_blocks


@nb.njit(nogil=True, cache=True, boundscheck=False)
def _decode(words, count, states, starts, lengths, ids, width, luts, values, spread, bits, out):
    """Returns the number of words read, or -1 where they ran out. `words` has 32 more behind its `count`."""
    at, x = np.int64(0), states.copy()
    mask, shift = np.uint32((1 << bits) - 1), np.uint32(bits)
    for r in range(len(ids)):
        w = np.int64(width[ids[r]])
        lut, val, row = luts[ids[r]], values[ids[r]], out[starts[r] : starts[r + 1]]
        steps = (lengths[r] + w - 1) // w
        at = _blocks(words, at, count, x, lut, val, spread, bits, w, steps // 32, row)
        if at < 0 or at > count:
            return np.int64(-1)
        for j in range(steps // 32 * 32, steps):
            k, at = _step(x, j & 31, lut, mask, shift, words, at)
            if w == 1:
                row[j] = BYTE_VALUES[k]
            else:
                for place in range(w):
                    row[j * w + place] = val[k, place]
        if at > count:
            return np.int64(-1)
    states[:] = x
    return at


@nb.njit(nogil=True, cache=True, boundscheck=False)
def _decode_exact(words, count, states, freqs, length, spread, out):
    """As `_decode`; a row's look-up table is made when the row is reached."""
    at, x, lut, none = np.int64(0), states.copy(), np.empty(256, np.uint32), np.empty((0, 4), np.int16)
    for r in range(len(freqs)):
        slot = 0
        for s in range(freqs.shape[1]):
            f = np.int64(freqs[r, s])
            for k in range(min(f, 256 - slot)):
                lut[slot + k] = np.uint32((f - 1) << 20 | k << 8 | s)
            slot += f
        if slot == 255:  # one value alone: its code is empty
            for k in range(256):
                lut[k] = np.uint32(255 << 20 | k << 8) | (lut[0] & np.uint32(255))
        at = _blocks(words, at, count, x, lut, none, spread, 8, 0, length // 32, out[r])
        if at < 0 or at > count:
            return np.int64(-1)
        for j in range(length // 32 * 32, length):
            out[r, j], at = _step(x, j & 31, lut, np.uint32(255), np.uint32(8), words, at)
        if at > count:
            return np.int64(-1)
    states[:] = x
    return at


@nb.njit(nogil=True, cache=True)
def _fill(out, starts, lengths, ids, width, escapes):
    """Put the escaped values where the symbols say so; returns how many fitted, -1 if there are too few."""
    at = 0
    for r in range(len(ids)):
        w, row = width[ids[r]], out[starts[r] : starts[r + 1]]
        used = (lengths[r] + w - 1) // w * w
        found = 0
        for t in range(used):
            found += row[t] == MISSING
        if found == 0:
            continue
        for t in range(0, used, w):
            if row[t] == MISSING:
                if at + w > len(escapes):
                    return -1
                for k in range(w):
                    row[t + k] = escapes[at + k]
                at += w
    return at
