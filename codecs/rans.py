"""32-lane interleaved range asymmetric numeral system (rANS): symbols to bytes and back.

State and stream follow Giesen, "Interleaved entropy coders" (arXiv 1402.3392): 32-bit states, 16-bit words, one word
stream that all lanes share in decoding order, tables of at most 12 bits. Rows are coded one after another, each with a
table of its own choice; within a row symbol i belongs to lane i % 32, and the states go on from row to row. A table may
code tuples of 2 or 4 neighbouring values at once, which makes both the stream of rare non-zero values shorter and the
decoder faster. Values that a table has no symbol for are escapes, kept as int16 behind the words.

    words u32 | escapes u32 | states 32 x u32 | words x u16 | escapes x i16      (little endian)

`encode` and `decode` take arrays and run the CPU path of lmcache_blend.triton_kernels.rans, which releases the GIL;
`encode_batch` and `decode_batch` take many streams at once, on any device, through its operators: the same bytes.
`decode_reference` is the same decoder in plain numpy.
"""

import struct
from collections.abc import Sequence

import numpy as np
import torch

from lmcache_blend.codecs.tables import Tables
from lmcache_blend.errors import CorruptChunkError
from lmcache_blend.triton_kernels import rans as ops
from lmcache_blend.triton_kernels.rans import cpu
from lmcache_blend.triton_kernels.rans.avx2 import SPREAD
from lmcache_blend.triton_kernels.rans.ops import LANES
from lmcache_blend.triton_kernels.rans.reference import LOW

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
    starts, lengths = row_starts(lengths), np.asarray(lengths, np.int64)
    symbols, escapes = np.empty(len(q), np.uint8), np.empty(len(q), np.int16)
    count = cpu.index(q, starts, lengths, ids, tables.width, tables.reach, tables.map, symbols, escapes)
    words = np.empty(len(q) + 1, np.uint16)
    start, states = cpu.encode(symbols, starts, lengths, ids, tables.width, tables.freq, tables.cum, tables.bits, words)
    return _pack(words[start:], states, escapes[:count])


def decode_rows(data: bytes | memoryview, lengths: np.ndarray, ids: np.ndarray, tables: Tables) -> np.ndarray:
    """What `encode_rows` coded: the flat int16 array; undefined between the rows. Raises CorruptChunkError."""
    words, escapes = _counts(data)
    _check_ids(ids, tables)
    stream, t = np.frombuffer(data, np.uint8).copy(), tables
    out, ended, filled = cpu.decode_stream(
        stream, words, np.asarray(lengths, np.int64), ids, t.kind, t.direct, t.values, t.width, SPREAD, t.bits
    )
    _check_end(ended)
    _check_filled(filled, escapes)
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
    used = cpu.decode_exact(padded, len(words), states, freq, length, SPREAD, out)
    _check_end(used == len(words) and bool((states == LOW).all()))
    if len(escapes):
        raise CorruptChunkError("a stream with exact tables has no escapes")
    return out


def encode_batch(
    q: torch.Tensor, lengths: Sequence[np.ndarray], ids: Sequence[np.ndarray], tables: Tables
) -> list[bytes]:
    """Streams of rows as `encode_rows` makes each: one flat int16 tensor on any device, stream after stream."""
    rows = _rows(lengths, ids, q.device)
    made = ops.encode(q, rows, tables.for_encode.to(q.device))
    firsts, counts, states = made.firsts.tolist(), made.counts.tolist(), made.states.cpu().numpy()
    words, escapes = made.words.cpu().numpy(), made.escapes.cpu().numpy()
    parts = rows.starts[rows.streams].tolist()
    return [
        _pack(words[firsts[s] : parts[s + 1] + s + 1], states[s], escapes[parts[s] : parts[s] + counts[s]])
        for s in range(len(lengths))
    ]


def decode_batch(
    streams: Sequence[bytes | memoryview],
    lengths: Sequence[np.ndarray],
    ids: Sequence[np.ndarray],
    tables: Tables,
    device: torch.device,
) -> torch.Tensor:
    """What `encode_batch` coded: the flat int16 tensor on the device, undefined between rows.

    Raises CorruptChunkError.
    """
    parsed = [_parse(data) for data in streams]
    for part in ids:
        _check_ids(part, tables)
    rows = _rows(lengths, ids, device)
    words, states, escapes = zip(*parsed, strict=True)
    counts = np.array([[len(w), len(e)] for w, e in zip(words, escapes, strict=True)])
    starts = np.concatenate((np.zeros((1, 2), np.int64), np.cumsum(counts, 0)))
    flat = np.concatenate((*words, np.zeros(LANES, np.uint16)))
    word_starts, escape_starts = (torch.from_numpy(x.copy()).to(device) for x in starts.T)
    made = ops.decode(
        torch.from_numpy(flat).to(device),
        word_starts,
        torch.from_numpy(np.stack(states)).to(device),
        torch.from_numpy(np.concatenate(escapes)).to(device),
        escape_starts,
        rows,
        sum(int(row_starts(n)[-1]) for n in lengths),
        tables.for_decode.to(device),
    )
    ends = made.states.cpu().numpy()
    for s, (used, filled) in enumerate(zip(made.used.tolist(), made.filled.tolist(), strict=True)):
        _check_end(used == counts[s, 0] and bool((ends[s] == LOW).all()))
        _check_filled(filled, counts[s, 1])
    return made.values


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
    _check_end(at == len(words) and bool((x == LOW).all()))
    lengths = np.full(len(ids), length)
    _check_filled(cpu.fill(out.reshape(-1), row_starts(lengths), lengths, ids, tables.width, escapes), len(escapes))
    return out[:, :length]


def _rows(lengths: Sequence[np.ndarray], ids: Sequence[np.ndarray], device: torch.device) -> ops.Rows:
    """The rows of all streams, one stream after another."""
    streams = np.concatenate(([0], np.cumsum([len(part) for part in ids])))
    flat = np.concatenate([np.asarray(n, np.int64) for n in lengths])
    parts = (streams, row_starts(flat), flat, np.concatenate([np.asarray(i, np.int64) for i in ids]))
    return ops.Rows(*(torch.from_numpy(np.asarray(x, np.int64)).to(device) for x in parts))


def _pack(words: np.ndarray, states: np.ndarray, escapes: np.ndarray) -> bytes:
    head = HEAD.pack(len(words), len(escapes))
    return head + states.astype("<u4").tobytes() + words.astype("<u2").tobytes() + escapes.astype("<i2").tobytes()


def _counts(data: bytes | memoryview) -> tuple[int, int]:
    """How many words and escapes a stream holds."""
    at = HEAD.size + 4 * LANES
    if len(data) < at:
        raise CorruptChunkError(f"{len(data)} bytes are too short for a rANS stream")
    words, escapes = HEAD.unpack_from(data)
    if len(data) != at + 2 * words + 2 * escapes:
        raise CorruptChunkError(f"{words} words and {escapes} escapes do not fit a rANS stream of {len(data)} bytes")
    return words, escapes


def _parse(data: bytes | memoryview) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    words, escapes = _counts(data)
    at = HEAD.size + 4 * LANES
    states = np.frombuffer(data, "<u4", LANES, HEAD.size).astype(np.uint32)
    return (
        np.frombuffer(data, "<u2", words, at).astype(np.uint16),
        states,
        np.frombuffer(data, "<i2", escapes, at + 2 * words).astype(np.int16),
    )


def _check_ids(ids: np.ndarray, tables: Tables) -> None:
    if len(ids) and int(ids.max()) >= len(tables):
        raise CorruptChunkError(f"table {int(ids.max())} of {len(tables)} does not exist")


def _check_end(ended: bool) -> None:
    if not ended:
        raise CorruptChunkError("the rANS stream does not end where it should: wrong bytes or wrong tables")


def _check_filled(filled: int, escapes: int) -> None:
    if filled != escapes:
        raise CorruptChunkError("the number of escaped values does not fit the symbols")
