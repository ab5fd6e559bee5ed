"""Tables on a GPU: a program per row or per part of a table."""

import triton
import triton.language as tl


@triton.jit
def histogram_rows(q, out, length, stride, span, reach, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Counts of -reach..reach of each row of q, larger values at the ends."""
    row = tl.program_id(0)
    counts = tl.zeros((BINS,), tl.int32)
    for b in range(0, length, BLOCK):
        t = b + tl.arange(0, BLOCK)
        live = t < length
        v = tl.load(q + row.to(tl.int64) * stride + t, mask=live, other=0).to(tl.int32)
        v = tl.minimum(tl.maximum(v, -reach), reach) + reach
        counts += tl.histogram(v, BINS, mask=live)
    i = tl.arange(0, BINS)
    tl.store(out + row.to(tl.int64) * span + i, counts.to(tl.float32), mask=i < span)


@triton.jit
def slot_table(freq, out, size, BITS: tl.constexpr, SYMBOLS: tl.constexpr, BLOCK: tl.constexpr):
    """The look-up entries of BLOCK slots of one table: the symbol of a slot is how many symbols end at or before it."""
    table = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    s = tl.arange(0, SYMBOLS)
    f = tl.load(freq + table * size + s, mask=s < size, other=0).to(tl.int32)
    end = tl.cumsum(f, 0)
    inside = (end >= first) & (end < first + BLOCK)
    steps = tl.histogram(tl.where(inside, end - first, 0), BLOCK, mask=inside)
    symbol = tl.cumsum(steps, 0) + tl.sum((end < first).to(tl.int32), 0)
    symbol = tl.minimum(symbol, SYMBOLS - 1)
    slot = first + tl.arange(0, BLOCK)
    entry = (tl.gather(f, symbol, 0) - 1) << 20 | (slot - tl.gather(end - f, symbol, 0)) << 8 | symbol
    tl.store(out + (table << BITS) + slot, entry.to(tl.uint32, bitcast=True))


@triton.jit
def rank_below(key, SIZE: tl.constexpr):
    """[SIZE] -> place of each in the stable ascending order."""
    i = tl.arange(0, SIZE)
    a, b = key[:, None], key[None, :]
    before = (b < a) | ((b == a) & (i[None, :] < i[:, None]))
    return tl.sum(before.to(tl.int32), 1)


@triton.jit
def normalise_rows(counts, out, size, BITS: tl.constexpr, SIZE: tl.constexpr):
    """Counts of each row to frequencies that sum to 2^BITS, at least 1 where the count is not 0."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    p = tl.load(counts + row * size + i, mask=i < size, other=0).to(tl.float64)
    p = tl.where((tl.sum(p, 0) == 0) & (i == 0), 1.0, p)
    used = p > 0
    f = tl.where(used, tl.maximum(tl.floor(p / tl.sum(p, 0) * (1 << BITS)), 1.0), 0.0).to(tl.int32)
    left = (1 << BITS) - tl.sum(f, 0)
    while left != 0:
        if left > 0:
            # One unit more shortens the code by p log(1 + 1/f).
            gain = tl.where(used, p * tl.log(1.0 + 1.0 / tl.maximum(f, 1).to(tl.float64)), -1.0)
            f += (used & (rank_below(-gain, SIZE) < left)).to(tl.int32)
        else:
            # One unit less lengthens it by p log(f / (f - 1)).
            loss = -p * tl.log(1.0 - 1.0 / tl.maximum(f, 2).to(tl.float64))
            loss = tl.where(f > 1, loss, float("inf"))
            f -= ((f > 1) & (rank_below(loss, SIZE) < -left)).to(tl.int32)
        left = (1 << BITS) - tl.sum(f, 0)
    tl.store(out + row * size + i, f.to(tl.uint16), mask=i < size)
