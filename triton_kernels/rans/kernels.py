"""rANS on a GPU: a warp per stream of 32 lanes, or a lane per stream; the same bytes as on CPU.

Which lanes need a word is a sum of one bit each (one instruction since sm80), and a lane's place among them a
population count of the bits below its own, so the innermost loop has no scan. Tables come through the L1 cache: a row
of symbols keeps to one table, 16 KiB at 12 bits. All other passes (values to symbols, symbols to values, escapes) have
a program per row.
"""

import triton
import triton.language as tl


@triton.jit
def count_bits(v):
    """Ones in a uint32; LLVM makes it one instruction."""
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return ((v * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def flags_of(need, bit):
    """[32] booleans -> a uint32 with a bit for each lane."""
    return tl.sum(tl.where(need, bit, 0).to(tl.int32, bitcast=True), 0).to(tl.uint32, bitcast=True)


@triton.jit
def decode_block(x, at, bit, live, target, words, count, lut, BITS: tl.constexpr, ALL: tl.constexpr):
    """One symbol of each lane (of the live ones unless ALL); returns states and place in the words."""
    entry = tl.load(lut + (x & ((1 << BITS) - 1)).to(tl.int32))
    tl.store(target, (entry & 255).to(target.dtype.element_ty), mask=None if ALL else live)
    y = ((entry >> 20) + 1) * (x >> BITS) + ((entry >> 8) & 4095)
    need = y < 65536
    if not ALL:
        need &= live
    flags = flags_of(need, bit)
    place = at + count_bits(flags & (bit - 1))
    word = tl.load(words + place, mask=need & (place < count), other=0).to(tl.uint32)
    y = tl.where(need, (y << 16) | word, y)
    if not ALL:
        y = tl.where(live, y, x)
    return y, at + count_bits(flags)


@triton.jit
def decode_streams(
    words, word_starts, states, streams, starts, lengths, ids, kinds, luts, out, ends, used,
    BITS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Symbols of each row to the first ceil(length / width) places of its part of `out`."""
    stream = tl.program_id(0)
    lane = tl.arange(0, 32)
    bit = tl.full((32,), 1, tl.uint32) << lane.to(tl.uint32)
    first = tl.load(word_starts + stream)
    count = (tl.load(word_starts + stream + 1) - first).to(tl.int32)
    x = tl.load(states + stream * 32 + lane).to(tl.uint32, bitcast=True)
    at = tl.full((), 0, tl.int32)
    for row in range(tl.load(streams + stream), tl.load(streams + stream + 1)):
        table = tl.load(ids + row)
        width = tl.maximum(tl.load(kinds + table).to(tl.int64), 1)
        steps = ((tl.load(lengths + row) + width - 1) // width).to(tl.int32)
        target = out + tl.load(starts + row) + lane
        lut = luts + (table << BITS)
        for _ in range(steps // (32 * UNROLL)):
            for _ in tl.static_range(UNROLL):
                x, at = decode_block(x, at, bit, True, target, words + first, count, lut, BITS, True)
                target += 32
        for left in range(steps % (32 * UNROLL), 0, -32):
            x, at = decode_block(x, at, bit, lane < left, target, words + first, count, lut, BITS, False)
            target += 32
    tl.store(ends + stream * 32 + lane, x.to(tl.int32, bitcast=True))
    tl.store(used + stream, at.to(tl.int64))


@triton.jit
def encode_streams(
    symbols, streams, starts, lengths, ids, widths, freqs, cums, words, firsts, states, BITS: tl.constexpr
):
    """Backwards over the rows; a stream's words end at the end of its part of `words`, which is 1 longer than its
    symbols' part."""
    stream = tl.program_id(0)
    lane = tl.arange(0, 32)
    bit = tl.full((32,), 1, tl.uint32) << lane.to(tl.uint32)
    x = tl.full((32,), 65536, tl.uint32)
    last = tl.load(streams + stream + 1)
    rows = last - tl.load(streams + stream)
    at = tl.load(starts + last) + stream + 1
    for back in range(rows):
        row = last - 1 - back
        table = tl.load(ids + row)
        width = tl.load(widths + table).to(tl.int64)
        steps = ((tl.load(lengths + row) + width - 1) // width).to(tl.int32)
        source = symbols + tl.load(starts + row)
        blocks = (steps + 31) // 32
        for b in range(blocks):
            j = (blocks - 1 - b) * 32 + lane
            live = j < steps
            s = table * 256 + tl.load(source + j, mask=live, other=0).to(tl.int64)
            f = tl.load(freqs + s, mask=live, other=1).to(tl.uint32)
            need = live & ((x >> (32 - BITS)) >= f)
            flags = flags_of(need, bit)
            at -= count_bits(flags)
            tl.store(words + at + count_bits(flags & (bit - 1)), (x & 0xFFFF).to(tl.uint16), mask=need)
            y = tl.where(need, x >> 16, x)
            d = y // f
            y = (d << BITS) + (y - d * f) + tl.load(cums + s, mask=live, other=0).to(tl.uint32)
            x = tl.where(live, y, x)
    tl.store(states + stream * 32 + lane, x.to(tl.int32, bitcast=True))
    tl.store(firsts + stream, at)


@triton.jit
def index_rows(q, starts, lengths, ids, widths, reaches, maps, symbols, counts, MAP: tl.constexpr, BLOCK: tl.constexpr):
    """Values to symbols, and how many values of each row escape."""
    row = tl.program_id(0)
    table = tl.load(ids + row)
    width = tl.load(widths + table).to(tl.int32)
    reach = tl.load(reaches + table).to(tl.int32)
    start = tl.load(starts + row)
    steps = ((tl.load(lengths + row) + width - 1) // width).to(tl.int32)
    found = tl.zeros((BLOCK,), tl.int32)
    for b in range(0, steps, BLOCK):
        j = b + tl.arange(0, BLOCK)
        live = j < steps
        code = tl.zeros((BLOCK,), tl.int32)
        inside = live
        for place in tl.static_range(4):
            here = live & (place < width)
            v = tl.load(q + start + j * width + place, mask=here, other=0).to(tl.int32)
            inside &= (v >= -reach) & (v <= reach)
            code = tl.where(place < width, code * (2 * reach + 1) + v + reach, code)
        s = tl.load(maps + table * MAP + code, mask=inside, other=255)
        tl.store(symbols + start + j, s, mask=live)
        found += (live & (s == 255)).to(tl.int32)
    tl.store(counts + row, tl.sum(found, 0).to(tl.int64) * width)


@triton.jit
def take_escapes(q, symbols, starts, lengths, ids, widths, counts, firsts, escapes, BLOCK: tl.constexpr):
    """The escaped values of each row, in order, from firsts[row] on."""
    row = tl.program_id(0)
    if tl.load(counts + row) > 0:
        width = tl.load(widths + tl.load(ids + row)).to(tl.int32)
        start = tl.load(starts + row)
        steps = ((tl.load(lengths + row) + width - 1) // width).to(tl.int32)
        at = tl.load(firsts + row)
        for b in range(0, steps, BLOCK):
            j = b + tl.arange(0, BLOCK)
            escaped = (tl.load(symbols + start + j, mask=j < steps, other=0) == 255).to(tl.int32)
            rank = tl.cumsum(escaped, 0) - escaped
            for place in tl.static_range(4):
                here = (escaped > 0) & (place < width)
                v = tl.load(q + start + j * width + place, mask=here, other=0)
                tl.store(escapes + at + rank * width + place, v, mask=here)
            at += (tl.sum(escaped, 0) * width).to(tl.int64)


@triton.jit
def expand_rows(symbols, starts, lengths, ids, kinds, values, out, counts, BLOCK: tl.constexpr):
    """Symbols to values, and how many values of each row are missing (escaped); those of kind 1 are values already."""
    row = tl.program_id(0)
    table = tl.load(ids + row)
    kind = tl.load(kinds + table).to(tl.int32)
    width = tl.maximum(kind, 1)
    start = tl.multiple_of(tl.load(starts + row), 4)
    used = ((tl.load(lengths + row) + width - 1) // width).to(tl.int32) * width
    found = tl.zeros((BLOCK,), tl.int32)
    for b in range(0, used, BLOCK):
        i = b + tl.arange(0, BLOCK)
        live = i < used
        s = tl.load(symbols + start + i // width, mask=live, other=0)
        at = (table * 256 + s.to(tl.int64)) * 4 + i % width
        single = s.to(tl.int8, bitcast=True).to(tl.int16)
        single = tl.where(single == -128, -32768, single).to(tl.int16)
        v = tl.where(kind == 1, single, tl.load(values + at, mask=live & (kind != 1), other=0))
        tl.store(out + start + i, v, mask=live)
        found += (live & (v == -32768)).to(tl.int32)
    tl.store(counts + row, tl.sum(found, 0).to(tl.int64))


@triton.jit
def put_escapes(out, starts, lengths, ids, kinds, counts, firsts, ends, escapes, BLOCK: tl.constexpr):
    """Fill the missing values of each row from escapes[firsts[row]] on; those at ends[row] or later do not exist."""
    row = tl.program_id(0)
    if tl.load(counts + row) > 0:
        width = tl.maximum(tl.load(kinds + tl.load(ids + row)).to(tl.int32), 1)
        start = tl.load(starts + row)
        used = ((tl.load(lengths + row) + width - 1) // width).to(tl.int32) * width
        at, end = tl.load(firsts + row), tl.load(ends + row)
        for b in range(0, used, BLOCK):
            i = b + tl.arange(0, BLOCK)
            missing = (tl.load(out + start + i, mask=i < used, other=0) == -32768).to(tl.int32)
            place = at + tl.cumsum(missing, 0) - missing
            here = (missing > 0) & (place < end)
            tl.store(out + start + i, tl.load(escapes + place, mask=here, other=0), mask=here)
            at += tl.sum(missing, 0).to(tl.int64)


@triton.jit
def decode_lanes(
    words, word_starts, states, ids, luts, out, ends, used, channels, tokens,
    BITS: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """A stream per lane: out [tokens, channels], token by token."""
    c = tl.program_id(0) * LANES + tl.arange(0, LANES)
    here = c < channels
    first = tl.load(word_starts + c, mask=here, other=0)
    count = (tl.load(word_starts + c + 1, mask=here, other=0) - first).to(tl.int32)
    x = tl.load(states + c, mask=here, other=65536).to(tl.uint32, bitcast=True)
    lut = luts + (tl.load(ids + c, mask=here, other=0) << BITS)
    source = words + first
    at = tl.zeros((LANES,), tl.int32)
    target = out + c
    for _ in range(tokens // UNROLL):
        for _ in tl.static_range(UNROLL):
            x, at = decode_lane(x, at, here, target, source, count, lut, BITS)
            target += channels
    for _ in range(tokens % UNROLL):
        x, at = decode_lane(x, at, here, target, source, count, lut, BITS)
        target += channels
    tl.store(ends + c, x.to(tl.int32, bitcast=True), mask=here)
    tl.store(used + c, at.to(tl.int64), mask=here)


@triton.jit
def decode_lane(x, at, here, target, source, count, lut, BITS: tl.constexpr):
    """One symbol of every lane."""
    entry = tl.load(lut + (x & ((1 << BITS) - 1)).to(tl.int32))
    tl.store(target, (entry & 255).to(tl.uint8), mask=here)
    x = ((entry >> 20) + 1) * (x >> BITS) + ((entry >> 8) & 4095)
    need = x < 65536
    word = tl.load(source + at, mask=need & (at < count), other=0).to(tl.uint32)
    return tl.where(need, (x << 16) | word, x), at + need.to(tl.int32)


@triton.jit
def encode_lanes(
    symbols, ids, freqs, cums, words, firsts, states, channels, tokens, BITS: tl.constexpr, LANES: tl.constexpr
):
    """A stream per lane: the words of channel c end at words[(c + 1) * tokens]."""
    c = tl.program_id(0) * LANES + tl.arange(0, LANES)
    here = c < channels
    table = tl.load(ids + c, mask=here, other=0) * 256
    x = tl.full((LANES,), 65536, tl.uint32)
    at = (c.to(tl.int64) + 1) * tokens
    for back in range(tokens):
        s = table + tl.load(symbols + (tokens - 1 - back).to(tl.int64) * channels + c, mask=here, other=0)
        f = tl.load(freqs + s, mask=here, other=1).to(tl.uint32)
        need = here & ((x >> (32 - BITS)) >= f)
        at -= need.to(tl.int64)
        tl.store(words + at, (x & 0xFFFF).to(tl.uint16), mask=need)
        x = tl.where(need, x >> 16, x)
        d = x // f
        x = (d << BITS) + (x - d * f) + tl.load(cums + s, mask=here, other=0).to(tl.uint32)
    tl.store(states + c, x.to(tl.int32, bitcast=True), mask=here)
    tl.store(firsts + c, at, mask=here)
