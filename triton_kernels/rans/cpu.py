"""rANS on CPU: numba kernels over one stream, which release the GIL; avx2.py has the decoder's inner loop where it can.

A table of kind 1 has the value itself, an int8, in its look-up entries in place of the symbol; kind 0 are single values
that an int8 does not hold, kinds 2 and 4 tuples.
"""

import numba as nb
import numpy as np

from lmcache_blend.triton_kernels.rans import avx2
from lmcache_blend.triton_kernels.rans.reference import ESCAPE, LOW, MISSING, MISSING_BYTE

BYTE_VALUES = np.arange(256).astype(np.int8).astype(np.int16)
"""The value in the low byte of an entry."""
BYTE_VALUES[MISSING_BYTE] = MISSING


@nb.njit(nogil=True, cache=True)
def index(q, starts, lengths, ids, width, reach, maps, symbols, escapes):
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
def encode(symbols, starts, lengths, ids, width, freqs, cums, bits, words):
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
def step(x, i, lut, mask, shift, words, at):
    """Decode one symbol of lane i; returns it and the place of the next word."""
    e = lut[x[i] & mask]
    s = ((e >> np.uint32(20)) + np.uint32(1)) * (x[i] >> shift) + ((e >> np.uint32(8)) & np.uint32(4095))
    more = (s << np.uint32(16)) | np.uint32(words[at])  # read in any case: a select, not a branch
    need = s < np.uint32(65536)
    x[i] = more if need else s
    return e & np.uint32(255), at + np.int64(need)


@nb.njit(nogil=True, cache=True, boundscheck=False)
def portable_blocks(words, at, count, x, lut, values, spread, bits, width, blocks, out):
    """`avx2.decode_blocks` for any processor."""
    mask, shift = np.uint32((1 << bits) - 1), np.uint32(bits)
    # The loops of 32 have a fixed length so that they unroll: 1.6 times the speed.
    for b in range(blocks):
        if at > count:
            return np.int64(-1)
        if width <= 1:
            part = out[b * 32 : b * 32 + 32]
            for i in range(32):
                k, at = step(x, i, lut, mask, shift, words, at)
                part[i] = k if width == 0 else BYTE_VALUES[k]
        elif width == 2:
            part = out[b * 64 : b * 64 + 64]
            for i in range(32):
                k, at = step(x, i, lut, mask, shift, words, at)
                part[2 * i] = values[k, 0]
                part[2 * i + 1] = values[k, 1]
        else:
            part = out[b * 128 : b * 128 + 128]
            for i in range(32):
                k, at = step(x, i, lut, mask, shift, words, at)
                for place in range(4):
                    part[4 * i + place] = values[k, place]
    return at


blocks_of_32 = avx2.decode_blocks if avx2.available() else portable_blocks


@nb.njit(nogil=True, cache=True, boundscheck=False)
def decode(words, count, states, starts, lengths, ids, kinds, luts, values, spread, bits, out):
    """Returns the number of words read, or -1 where they ran out. `words` has 32 more behind its `count`."""
    at, x = np.int64(0), states.copy()
    mask, shift = np.uint32((1 << bits) - 1), np.uint32(bits)
    for r in range(len(ids)):
        kind = np.int64(kinds[ids[r]])
        w = max(kind, 1)
        lut, val, row = luts[ids[r]], values[ids[r]], out[starts[r] : starts[r + 1]]
        steps = (lengths[r] + w - 1) // w
        at = blocks_of_32(words, at, count, x, lut, val, spread, bits, kind, steps // 32, row)
        if at < 0 or at > count:
            return np.int64(-1)
        for j in range(steps // 32 * 32, steps):
            k, at = step(x, j & 31, lut, mask, shift, words, at)
            if kind <= 1:
                row[j] = k if kind == 0 else BYTE_VALUES[k]
            else:
                for place in range(w):
                    row[j * w + place] = val[k, place]
        if at > count:
            return np.int64(-1)
        if kind == 0:
            for j in range(steps):
                row[j] = val[row[j], 0]
    states[:] = x
    return at


@nb.njit(nogil=True, cache=True, boundscheck=False)
def decode_exact(words, count, states, freqs, length, spread, out):
    """As `decode`; a row's look-up table is made when the row is reached."""
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
        at = blocks_of_32(words, at, count, x, lut, none, spread, 8, 0, length // 32, out[r])
        if at < 0 or at > count:
            return np.int64(-1)
        for j in range(length // 32 * 32, length):
            out[r, j], at = step(x, j & 31, lut, np.uint32(255), np.uint32(8), words, at)
        if at > count:
            return np.int64(-1)
    states[:] = x
    return at


@nb.njit(nogil=True, cache=True)
def fill(out, starts, lengths, ids, width, escapes):
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


@nb.njit(nogil=True, cache=True, boundscheck=False)
def decode_stream(data, count, lengths, ids, kinds, luts, values, width, spread, bits):
    """Rows of a whole stream, uint8 data with `count` words, in one call: those that load share one interpreter.

    Returns the values, whether words and states end as they must, and how many escapes were filled in.
    """
    first = 8 + 4 * 32
    starts = np.zeros(len(lengths) + 1, np.int64)
    for r in range(len(lengths)):
        starts[r + 1] = starts[r] + (lengths[r] + 3) // 4 * 4
    states, escapes = data[8:first].view(np.uint32).copy(), data[first + 2 * count :].view(np.int16)
    words = np.zeros(count + 32, np.uint16)
    words[:count] = data[first : first + 2 * count].view(np.uint16)
    out = np.empty(starts[-1], np.int16)
    ended = decode(words, count, states, starts, lengths, ids, kinds, luts, values, spread, bits, out) == count
    for x in states:
        ended &= x == LOW
    return out, ended, fill(out, starts, lengths, ids, width, escapes) if ended else 0


@nb.njit(nogil=True, cache=True)
def encode_lanes(symbols, ids, freqs, cums, bits, words, firsts, states):
    """A stream per channel of symbols [T, C], its words at the end of words [C, T]; returns whether all have codes."""
    shift, top = np.uint32(bits), np.uint32(32 - bits)
    for c in range(symbols.shape[1]):
        freq, cum, x, at = freqs[ids[c]], cums[ids[c]], np.uint32(LOW), len(symbols)
        for t in range(len(symbols) - 1, -1, -1):
            f = np.uint32(freq[symbols[t, c]])
            if f == 0:
                return False
            if (x >> top) >= f:
                at -= 1
                words[c, at] = x & np.uint32(0xFFFF)
                x >>= np.uint32(16)
            d = x // f
            x = (d << shift) + (x - d * f) + np.uint32(cum[symbols[t, c]])
        firsts[c], states[c] = at, x
    return True


@nb.njit(nogil=True, cache=True)
def decode_lanes(words, starts, states, ids, luts, bits, out, used):
    """Returns nothing: used [C] words of each stream, more than it has where it is cut short."""
    shift, mask = np.uint32(bits), np.uint32((1 << bits) - 1)
    for c in range(out.shape[1]):
        lut, x, at, end = luts[ids[c]], states[c], starts[c], starts[c + 1]
        for t in range(len(out)):
            e = lut[x & mask]
            out[t, c] = e & np.uint32(255)
            x = ((e >> np.uint32(20)) + np.uint32(1)) * (x >> shift) + ((e >> np.uint32(8)) & np.uint32(4095))
            if x < np.uint32(LOW):
                x = (x << np.uint32(16)) | np.uint32(words[at] if at < end else 0)
                at += 1
        used[c], states[c] = at - starts[c], x
