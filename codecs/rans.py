"""32-lane interleaved range asymmetric numeral system (rANS): symbols to bytes and back.

State and stream follow Giesen, "Interleaved entropy coders" (arXiv 1402.3392): 32-bit states, 16-bit words, one word
stream that all lanes share in decoding order, tables of at most 12 bits. Rows are coded one after another, each with a
table of its own choice; within a row symbol i belongs to lane i % 32, and the states go on from row to row. A table may
code tuples of 2 or 4 neighbouring values at once, which makes both the stream of rare non-zero values shorter and the
decoder faster. Values that a table has no symbol for are escapes, kept as int16 behind the words.

    words u32 | escapes u32 | states 32 x u32 | words x u16 | escapes x i16      (little endian)

The work is done by the operators of lmcache_blend.triton_kernels.rans, on CPU by numba, without the GIL;
`decode_reference` is the same decoder in plain numpy.
"""

import struct

import numpy as np
import torch

from lmcache_blend.codecs.tables import MISSING, Tables
from lmcache_blend.errors import CorruptChunkError
from lmcache_blend.triton_kernels import rans as ops
from lmcache_blend.triton_kernels.rans.cpu import fill
from lmcache_blend.triton_kernels.rans.ops import LANES, LOW

HEAD = struct.Struct("<II")


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
    rows = _rows(lengths, ids)
    made = ops.encode(torch.from_numpy(np.ascontiguousarray(q)), rows, tables.for_encode)
    count = int(made.counts[0])
    used, escapes = made.words.numpy()[int(made.firsts[0]) :], made.escapes.numpy()[:count]
    states = made.states.numpy().astype("<u4")
    return (
        HEAD.pack(len(used), count) + states.tobytes() + used.astype("<u2").tobytes() + escapes.astype("<i2").tobytes()
    )


def decode_rows(data: bytes | memoryview, lengths: np.ndarray, ids: np.ndarray, tables: Tables) -> np.ndarray:
    """What `encode_rows` coded: the flat int16 array; undefined between the rows. Raises CorruptChunkError."""
    words, states, escapes = _parse(data)
    _check_ids(ids, tables)
    rows = _rows(lengths, ids)
    made = ops.decode(
        *_words(words),
        torch.from_numpy(states[None]),
        torch.from_numpy(escapes),
        torch.tensor((0, len(escapes))),
        rows,
        int(rows.starts[-1]),
        tables.for_decode,
    )
    _check_end(int(made.used[0]), len(words), made.states.numpy())
    if int(made.filled[0]) != len(escapes):
        raise CorruptChunkError("the number of escaped values does not fit the symbols")
    return made.values.numpy()


def decode_exact(data: bytes | memoryview, freq: np.ndarray, length: int) -> np.ndarray:
    """What `encode` coded with `tables.exact` at 8 bits: [R, length] int16, without a table in memory for every row.

    freq: [R, A] uint8, frequencies of the values 0..A-1; a row's only value has 255 for 256. Raises CorruptChunkError.
    """
    total = freq.sum(1, dtype=np.int64)
    if not ((total == 256) | ((total == 255) & (freq.max(1, initial=0) == 255))).all():
        raise CorruptChunkError("a table's frequencies do not sum to 256")
    words, states, escapes = _parse(data)
    values, used, ends = ops.decode_exact(
        *_words(words), torch.from_numpy(states[None]), torch.tensor((0, len(freq))), torch.tensor(freq), length
    )
    _check_end(int(used[0]), len(words), ends.numpy())
    if len(escapes):
        raise CorruptChunkError("a stream with exact tables has no escapes")
    return values.numpy()


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
    if fill(out.reshape(-1), row_starts(lengths), lengths, ids, tables.width, escapes) != len(escapes):
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


def _rows(lengths: np.ndarray, ids: np.ndarray) -> ops.Rows:
    """All rows in one stream."""
    parts = (row_starts(lengths), lengths, ids)
    return ops.Rows(torch.tensor((0, len(ids))), *(torch.from_numpy(np.ascontiguousarray(x, np.int64)) for x in parts))


def _words(words: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(the words and 32 more, where the stream starts and ends)."""
    return torch.from_numpy(np.concatenate((words, np.zeros(LANES, np.uint16)))), torch.tensor((0, len(words)))


def _check_ids(ids: np.ndarray, tables: Tables) -> None:
    if len(ids) and int(ids.max()) >= len(tables):
        raise CorruptChunkError(f"table {int(ids.max())} of {len(tables)} does not exist")


def _check_end(used: int, words: int, states: np.ndarray) -> None:
    if used != words or (states != LOW).any():
        raise CorruptChunkError("the rANS stream does not end where it should: wrong bytes or wrong tables")
