"""rANS: operators over many streams at once.

A stream is what one container segment holds: 32 lanes that share their words (`encode`, `decode`); `encode_lanes` and
`decode_lanes` have a stream for every channel instead. All return how many words and escapes were found: the caller
compares that with what the container says, on any device without a transfer in between.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmcache_blend.triton_kernels.launch import launch, on_triton
from lmcache_blend.triton_kernels.operator import operator
from lmcache_blend.triton_kernels.rans import cpu
from lmcache_blend.triton_kernels.rans.avx2 import SPREAD
from lmcache_blend.triton_kernels.tables.ops import slots

LANES = 32
UNROLL, UNROLL_INT16 = 2, 4
"""Steps in the innermost loop of a decoder of symbols, and of one of int16 values: from so many on it takes less than
one instruction per symbol on sm90."""
BLOCK = 1024
"""Symbols at a time of the passes that have a program per row."""


class EncodeTables(NamedTuple):
    """n tables of `bits` bits, the encoder's part of codecs.tables.Tables, on any device.

    width [n] uint8, reach [n] int16, map [n, M] uint8, freq and cum [n, 256] uint16.
    """

    bits: int
    width: Tensor
    reach: Tensor
    map: Tensor
    freq: Tensor
    cum: Tensor

    def to(self, device: torch.device) -> "EncodeTables":
        """The same on another device."""
        return EncodeTables(self.bits, *(t.to(device) for t in self[1:]))


class DecodeTables(NamedTuple):
    """The decoder's part: kind [n] uint8, lut [n, 2^bits] uint32, values [n, 256, 4] int16.

    lut by slot: frequency - 1 (12 bits), slot - cum (12), and the symbol (8). kind: values that a symbol stands for, 2
    or 4; a single one is kind 0, or kind 1 where the look-up entry has the value itself, an int8 (-128: the escape).
    """

    bits: int
    kind: Tensor
    lut: Tensor
    values: Tensor

    def to(self, device: torch.device) -> "DecodeTables":
        """The same on another device."""
        return DecodeTables(self.bits, *(t.to(device) for t in self[1:]))


class Rows(NamedTuple):
    """R rows of values in S streams, all int64: stream s has rows streams[s] to streams[s + 1].

    starts [R + 1]: where rows start in a flat array, multiples of 4. lengths [R] in values. ids [R]: their tables.
    """

    streams: Tensor
    starts: Tensor
    lengths: Tensor
    ids: Tensor


class Encoded(NamedTuple):
    """Stream s has the words firsts[s] to the end of its part, starts[streams[s + 1]] + s + 1; and `counts[s]` escapes
    from starts[streams[s]] on. states [S, 32] uint32."""

    words: Tensor
    firsts: Tensor
    states: Tensor
    escapes: Tensor
    counts: Tensor


class Decoded(NamedTuple):
    """values [N] int16, undefined between rows; of every stream:

    used [S]: words read, more than there are (-1 on CPU) where it is cut short. filled [S]: escapes put in place,
    -1 where there are too few. states [S, 32]: all LOW where nothing is wrong.
    """

    values: Tensor
    used: Tensor
    filled: Tensor
    states: Tensor


def encode(q: Tensor, rows: Rows, tables: EncodeTables) -> Encoded:
    """Values q [N] int16 in [-32767, 32767], zeros between rows -> streams. Raises ValueError where shapes misfit."""
    _check(q.shape == (q.numel(),) and q.dtype == torch.int16, f"values are {q.dtype} {tuple(q.shape)}, not [N] int16")
    _check_rows(rows)
    t = tables
    return Encoded(*_encode(q, *rows, t.width, t.reach, t.map, t.freq, t.cum, t.bits))


def decode(
    words: Tensor,
    word_starts: Tensor,
    states: Tensor,
    escapes: Tensor,
    escape_starts: Tensor,
    rows: Rows,
    size: int,
    tables: DecodeTables,
) -> Decoded:
    """Streams -> values.

    words [W + 32] uint16: those of stream s from word_starts[s] to word_starts[s + 1], and 32 of any value behind all.
    states [S, 32] uint32. escapes [E] int16, those of stream s from escape_starts[s] on. size: rows.starts[-1].
    Raises ValueError where shapes do not fit.
    """
    count = len(rows.streams) - 1
    _check(states.shape == (count, LANES), f"states of shape {tuple(states.shape)}, not {(count, LANES)}")
    for name, x in (("word_starts", word_starts), ("escape_starts", escape_starts)):
        _check(x.shape == (count + 1,), f"{name} of shape {tuple(x.shape)}, not {(count + 1,)}")
    _check(len(words) >= LANES, f"{len(words)} words: 32 are needed behind the last stream")
    _check_rows(rows)
    t = tables
    return Decoded(
        *_decode(words, word_starts, states, escapes, escape_starts, *rows, size, t.kind, t.lut, t.values, t.bits)
    )


def decode_exact(
    words: Tensor, word_starts: Tensor, states: Tensor, streams: Tensor, freq: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Streams whose rows have a table of 8 bits each and no escapes; arguments else as those of `decode`.

    freq [R, A] uint8, A <= 256: frequencies of the values 0..A-1 that sum to 256, or 255 for a row's only value.
    Returns values [R, length] int16, used [S] words (more than there are, or -1 on CPU, where a stream is cut short),
    states [S, 32]. Raises ValueError where shapes do not fit.
    """
    count = len(streams) - 1
    _check(states.shape == (count, LANES), f"states of shape {tuple(states.shape)}, not {(count, LANES)}")
    _check(word_starts.shape == (count + 1,), f"word_starts of shape {tuple(word_starts.shape)}, not {(count + 1,)}")
    _check(len(words) >= LANES, f"{len(words)} words: 32 are needed behind the last stream")
    _check(freq.dim() == 2 and freq.dtype == torch.uint8, f"frequencies are {freq.dtype} {tuple(freq.shape)}")
    return _decode_exact(words, word_starts, states, streams, freq.contiguous(), length)


def encode_lanes(symbols: Tensor, ids: Tensor, tables: EncodeTables) -> tuple[Tensor, Tensor, Tensor]:
    """symbols [T, C] uint8, a stream for each channel by table ids [C] int64.

    Returns words [C, T] uint16 of which channel c has those from firsts[c] on, firsts [C] int64, states [C] uint32.
    Raises ValueError on CPU where a symbol has no frequency (on a GPU its stream is undefined).
    """
    _check(symbols.dim() == 2 and symbols.dtype == torch.uint8, f"symbols are {symbols.dtype} {tuple(symbols.shape)}")
    _check(ids.shape == symbols.shape[1:], f"{len(ids)} tables for {symbols.shape[1]} channels")
    return _encode_lanes(symbols.contiguous(), ids, tables.freq, tables.cum, tables.bits)


def decode_lanes(
    words: Tensor, starts: Tensor, states: Tensor, ids: Tensor, lut: Tensor, bits: int, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """words [W] uint16, those of channel c from starts[c] to starts[c + 1]; states [C] uint32, ids [C] int64.

    lut: [n, 2^bits] of `tables.slots`.
    Returns symbols [tokens, C] uint8, used [C] words (more than there are where a stream is cut short), states [C].
    """
    _check(starts.shape == (len(ids) + 1,), f"starts of shape {tuple(starts.shape)} for {len(ids)} channels")
    _check(states.shape == ids.shape, f"states of shape {tuple(states.shape)} for {len(ids)} channels")
    return _decode_lanes(words, starts, states, ids, lut, bits, tokens)


def lanes_per_program(channels: int) -> int:
    """A warp's 32: with more programs each multiprocessor has more independent chains of loads to wait for."""
    return 32 if channels > 16 else 16


def _check(right: bool, message: str) -> None:
    if not right:
        raise ValueError(message)


def _check_rows(rows: Rows) -> None:
    count = len(rows.ids)
    _check(rows.lengths.shape == (count,), f"{len(rows.lengths)} lengths for {count} rows")
    _check(rows.starts.shape == (count + 1,), f"{len(rows.starts)} starts for {count} rows")
    for name, x in rows._asdict().items():
        _check(x.dtype == torch.int64, f"{name} is {x.dtype}, not int64")


def _firsts_of(counts: Tensor, bases: Tensor, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """counts [R] of rows, bases [S] of streams -> (where each row's part starts [R], stream of each row [R], totals
    [S])."""
    stream = torch.searchsorted(streams[1:], torch.arange(len(counts), device=counts.device), right=True)
    before = torch.cumsum(counts, 0) - counts
    edges = torch.cat((before, before[-1:] + counts[-1:])) if len(counts) else counts.new_zeros(1)
    return bases[stream] + before - edges[streams[:-1]][stream], stream, edges[streams[1:]] - edges[streams[:-1]]


def _run_encode(
    q: Tensor, streams: Tensor, starts: Tensor, lengths: Tensor, ids: Tensor, width: Tensor, reach: Tensor,
    maps: Tensor, freq: Tensor, cum: Tensor, bits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    words, firsts, states, escapes, counts = _fake_encode(
        q, streams, starts, lengths, ids, width, reach, maps, freq, cum, bits
    )
    symbols = torch.empty(len(q), dtype=torch.uint8, device=q.device)
    if on_triton(q, starts, ids, freq):
        from lmcache_blend.triton_kernels.rans import kernels

        found = torch.empty_like(lengths)
        launch(
            kernels.index_rows, (len(ids),), q, starts, lengths, ids, width, reach, maps, symbols, found,
            MAP=maps.shape[1], BLOCK=BLOCK,
        )  # fmt: skip
        at, _, total = _firsts_of(found, starts[streams[:-1]], streams)
        counts.copy_(total)
        launch(
            kernels.take_escapes, (len(ids),), q, symbols, starts, lengths, ids, width, found, at, escapes, BLOCK=BLOCK
        )
        launch(
            kernels.encode_streams, (len(counts),), symbols, streams, starts, lengths, ids, width, freq, cum, words,
            firsts, states, BITS=bits, num_warps=1,
        )  # fmt: skip
        return words, firsts, states, escapes, counts
    n = [x.numpy() for x in (q, starts, lengths, ids, width, reach, maps, freq, cum, symbols, words, escapes)]
    q_, starts_, lengths_, ids_, width_, reach_, maps_, freq_, cum_, symbols_, words_, escapes_ = n
    rows, firsts_, states_, counts_ = streams.tolist(), firsts.numpy(), states.numpy(), counts.numpy()
    for s, (first, last) in enumerate(pairwise(rows)):
        a, b = int(starts_[first]), int(starts_[last])
        place = (starts_[first : last + 1] - a, lengths_[first:last], ids_[first:last], width_)
        counts_[s] = cpu.index(q_[a:b], *place, reach_, maps_, symbols_[a:b], escapes_[a:b])
        at, states_[s] = cpu.encode(symbols_[a:b], *place, freq_, cum_, bits, words_[a + s : b + s + 1])
        firsts_[s] = a + s + at
    return words, firsts, states, escapes, counts


def _fake_encode(
    q: Tensor, streams: Tensor, starts: Tensor, lengths: Tensor, ids: Tensor, width: Tensor, reach: Tensor,
    maps: Tensor, freq: Tensor, cum: Tensor, bits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    count = streams.shape[0] - 1
    return (
        q.new_empty(q.shape[0] + count, dtype=torch.uint16),
        q.new_empty(count, dtype=torch.int64),
        q.new_empty((count, LANES), dtype=torch.uint32),
        torch.empty_like(q),
        q.new_empty(count, dtype=torch.int64),
    )


def _run_decode(
    words: Tensor, word_starts: Tensor, states: Tensor, escapes: Tensor, escape_starts: Tensor, streams: Tensor,
    starts: Tensor, lengths: Tensor, ids: Tensor, size: int, kind: Tensor, lut: Tensor, values: Tensor, bits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    count = streams.shape[0] - 1
    out = torch.empty(size, dtype=torch.int16, device=words.device)
    if on_triton(words, states, starts, ids, lut):
        from lmcache_blend.triton_kernels.rans import kernels

        used = torch.empty(count, dtype=torch.int64, device=words.device)
        symbols = torch.empty(size, dtype=torch.uint8, device=words.device)
        found, ends = torch.empty_like(lengths), torch.empty_like(states)
        launch(
            kernels.decode_streams, (count,), words, word_starts, states, streams, starts, lengths, ids, kind, lut,
            symbols, ends, used, BITS=bits, UNROLL=UNROLL, num_warps=1,
        )  # fmt: skip
        launch(kernels.expand_rows, (len(ids),), symbols, starts, lengths, ids, kind, values, out, found, BLOCK=BLOCK)
        at, stream, total = _firsts_of(found, escape_starts[:-1], streams)
        launch(
            kernels.put_escapes, (len(ids) if len(escapes) else 0,), out, starts, lengths, ids, kind, found, at,
            escape_starts[1:][stream], escapes, BLOCK=BLOCK,
        )  # fmt: skip
        return out, used, torch.where(total > escape_starts.diff(), -1, total), ends
    ends = states.clone()
    n = [x.numpy() for x in (words, starts, lengths, ids, kind, lut, values, escapes, out, ends)]
    words_, starts_, lengths_, ids_, kind_, lut_, values_, escapes_, out_, ends_ = n
    rows, where, escape_at = streams.tolist(), word_starts.tolist(), escape_starts.tolist()
    width_, found = np.maximum(kind_, 1), []
    for s, (first, last) in enumerate(pairwise(rows)):
        a, b = int(starts_[first]), int(starts_[last])
        place = (starts_[first : last + 1] - a, lengths_[first:last], ids_[first:last])
        part = out_[a:b]
        count = where[s + 1] - where[s]
        read = cpu.decode(words_[where[s] :], count, ends_[s], *place, kind_, lut_, values_, SPREAD, bits, part)
        put = cpu.fill(part, *place, width_, escapes_[escape_at[s] : escape_at[s + 1]]) if read >= 0 else -1
        found.append((read, put))
    used, filled = torch.tensor(found, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return out, used.clone(), filled.clone(), ends


def _fake_decode(
    words: Tensor, word_starts: Tensor, states: Tensor, escapes: Tensor, escape_starts: Tensor, streams: Tensor,
    starts: Tensor, lengths: Tensor, ids: Tensor, size: int, kind: Tensor, lut: Tensor, values: Tensor, bits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    used = words.new_empty(streams.shape[0] - 1, dtype=torch.int64)
    return words.new_empty(size, dtype=torch.int16), used, torch.empty_like(used), torch.empty_like(states)


def _run_decode_exact(
    words: Tensor, word_starts: Tensor, states: Tensor, streams: Tensor, freq: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    out, used, ends = _fake_decode_exact(words, word_starts, states, streams, freq, length)
    rows = len(freq)
    if on_triton(words, states, streams, freq):
        from lmcache_blend.triton_kernels.rans import kernels

        alone = (freq == 255) & (freq.sum(1, keepdim=True, dtype=torch.int32) == 255)
        lut = slots((freq.to(torch.int32) + alone).to(torch.uint16), 8)
        index = torch.arange(rows + 1, device=words.device)
        lengths = torch.full((rows,), length, device=words.device)
        width = torch.ones(rows, dtype=torch.uint8, device=words.device)
        launch(
            kernels.decode_streams, (len(used),), words, word_starts, states, streams, index * length, lengths, index,
            width, lut, out, ends, used, BITS=8, UNROLL=UNROLL_INT16, num_warps=1,
        )  # fmt: skip
        return out, used, ends
    words_, freq_, out_ = words.numpy(), freq.numpy(), out.numpy()
    rows_, where, read = streams.tolist(), word_starts.tolist(), []
    ends_ = ends.copy_(states).numpy()
    for s, (first, last) in enumerate(pairwise(rows_)):
        part = (freq_[first:last], length, SPREAD, out_[first:last])
        read.append(cpu.decode_exact(words_[where[s] :], where[s + 1] - where[s], ends_[s], *part))
    return out, torch.tensor(read, dtype=torch.int64), ends


def _fake_decode_exact(
    words: Tensor, word_starts: Tensor, states: Tensor, streams: Tensor, freq: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    used = words.new_empty(streams.shape[0] - 1, dtype=torch.int64)
    return words.new_empty((freq.shape[0], length), dtype=torch.int16), used, torch.empty_like(states)


def _run_encode_lanes(
    symbols: Tensor, ids: Tensor, freq: Tensor, cum: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    words, firsts, states = _fake_encode_lanes(symbols, ids, freq, cum, bits)
    tokens, channels = symbols.shape
    if on_triton(symbols, ids, freq, cum):
        from lmcache_blend.triton_kernels.rans import kernels

        lanes = lanes_per_program(channels)
        launch(
            kernels.encode_lanes, (-(-channels // lanes),), symbols, ids, freq, cum, words, firsts, states, channels,
            tokens, BITS=bits, LANES=lanes, num_warps=1,
        )  # fmt: skip
        return words, firsts - torch.arange(channels, device=ids.device) * tokens, states
    made = (words.numpy(), firsts.numpy(), states.numpy())
    if not cpu.encode_lanes(symbols.numpy(), ids.numpy(), freq.numpy(), cum.numpy(), bits, *made):
        raise ValueError("a symbol has no frequency in the table of its channel")
    return words, firsts, states


def _fake_encode_lanes(
    symbols: Tensor, ids: Tensor, freq: Tensor, cum: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, channels = symbols.shape
    return (
        symbols.new_empty((channels, tokens), dtype=torch.uint16),
        symbols.new_empty(channels, dtype=torch.int64),
        symbols.new_empty(channels, dtype=torch.uint32),
    )


def _run_decode_lanes(
    words: Tensor, starts: Tensor, states: Tensor, ids: Tensor, lut: Tensor, bits: int, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    out, used, ends = _fake_decode_lanes(words, starts, states, ids, lut, bits, tokens)
    channels = len(ids)
    if on_triton(words, starts, states, ids, lut):
        from lmcache_blend.triton_kernels.rans import kernels

        lanes = lanes_per_program(channels)
        launch(
            kernels.decode_lanes, (-(-channels // lanes),), words, starts, states, ids, lut, out, ends, used, channels,
            tokens, BITS=bits, LANES=lanes, UNROLL=UNROLL, num_warps=1,
        )  # fmt: skip
        return out, used, ends
    ends.copy_(states)
    made = (out.numpy(), used.numpy())
    cpu.decode_lanes(words.numpy(), starts.numpy(), ends.numpy(), ids.numpy(), lut.numpy(), bits, *made)
    return out, used, ends


def _fake_decode_lanes(
    words: Tensor, starts: Tensor, states: Tensor, ids: Tensor, lut: Tensor, bits: int, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    channels = ids.shape[0]
    return (
        words.new_empty((tokens, channels), dtype=torch.uint8),
        words.new_empty(channels, dtype=torch.int64),
        torch.empty_like(states),
    )


_encode = operator("rans_encode", _run_encode, _fake_encode)
_decode = operator("rans_decode", _run_decode, _fake_decode)
_decode_exact = operator("rans_decode_exact", _run_decode_exact, _fake_decode_exact)
_encode_lanes = operator("rans_encode_lanes", _run_encode_lanes, _fake_encode_lanes)
_decode_lanes = operator("rans_decode_lanes", _run_decode_lanes, _fake_decode_lanes)
