"""Transforms on a GPU: one matrix product with the scatter of classes and the quantiser at its ends.

Symbols lie in rows by table: of coefficient r and class c, those of the class's tokens from offsets[r, c] on. Tokens
are taken in the order of their classes, so a tile reads and writes runs of them. A symbol is an exact float16 up to
2,048, and beyond as exact as the KV; the step, one per token, is applied after the product.
"""

import triton
import triton.language as tl


@triton.jit
def classes_of(j, bounds, live, CLASSES: tl.constexpr):
    """(class, first token of the class) of tokens j in the order of classes."""
    kind = tl.zeros(j.shape, tl.int32)
    for c in tl.static_range(1, CLASSES):
        kind += (j >= tl.load(bounds + c)).to(tl.int32)
    return kind, tl.load(bounds + kind, mask=live, other=0)


@triton.jit
def synthesise_tile(
    symbols, order, bounds, offsets, steps, inverse, base, features, predict, out,
    tokens, dims, ranks, feature_count,
    CLASSES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[order[j]] = base + features[order[j]] @ predict + steps[class] * (symbols of j @ inverse)."""
    j = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    live, wide = j < tokens, d < dims
    kind, first = classes_of(j, bounds, live, CLASSES)
    run = j - first
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for at in range(0, ranks, BLOCK_R):
        inside = at + r < ranks
        # Tokens are the fast axis here, since neighbours lie side by side.
        both = inside[:, None] & live[None, :]
        start = tl.load(offsets + (at + r)[:, None] * CLASSES + kind[None, :], mask=both, other=-1)
        s = tl.load(symbols + start + run[None, :], mask=start >= 0, other=0)
        b = tl.load(
            inverse + (at + r).to(tl.int64)[:, None] * dims + d[None, :], mask=inside[:, None] & wide[None, :], other=0
        )
        acc = tl.dot(tl.trans(s.to(tl.float32).to(b.dtype)), b, acc, input_precision=PRECISION)
    acc *= tl.load(steps + kind, mask=live, other=0)[:, None]
    row = tl.load(order + j, mask=live, other=0)
    f = tl.arange(0, BLOCK_F)
    for at in range(0, feature_count, BLOCK_F):
        inside = at + f < feature_count
        a = tl.load(
            features + row[:, None] * feature_count + (at + f)[None, :], mask=live[:, None] & inside[None, :], other=0
        )
        b = tl.load(
            predict + (at + f).to(tl.int64)[:, None] * dims + d[None, :], mask=inside[:, None] & wide[None, :], other=0
        )
        acc = tl.dot(a.to(tl.float32).to(b.dtype), b, acc, input_precision=PRECISION)
    acc += tl.load(base + d, mask=wide, other=0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * dims + d[None, :], acc.to(out.dtype.element_ty), mask=live[:, None] & wide[None, :])


@triton.jit
def analyse_tile(
    x, base, forward, order, bounds, offsets, steps, symbols, largest, tokens, dims, ranks,
    CLASSES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Symbols of (x - base) @ forward, rounded in steps of each token's class; the largest magnitude of the tile."""
    j = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    live, inside = j < tokens, r < ranks
    row = tl.load(order + j, mask=live, other=0)
    # The product is taken with tokens as its columns, the fast axis of symbols in memory.
    acc = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
    for at in range(0, dims, BLOCK_D):
        here = live[:, None] & (at + d < dims)[None, :]
        place = row[:, None] * dims + (at + d)[None, :]
        a = tl.load(x + place, mask=here, other=0).to(tl.float32) - tl.load(base + place, mask=here, other=0)
        b = tl.load(
            forward + (at + d).to(tl.int64)[:, None] * ranks + r[None, :],
            mask=(at + d < dims)[:, None] & inside[None, :],
            other=0,
        )
        acc = tl.dot(tl.trans(b), tl.trans(a.to(b.dtype)), acc, input_precision=PRECISION)
    kind, first = classes_of(j, bounds, live, CLASSES)
    inverse = tl.div_rn(tl.full((BLOCK_T,), 1.0, tl.float32), tl.load(steps + kind, mask=live, other=1))
    v = acc * inverse[None, :]
    v = tl.where(tl.abs(v) < 4194304.0, (v + 12582912.0) - 12582912.0, v)
    both = inside[:, None] & live[None, :]
    start = tl.load(offsets + r[:, None] * CLASSES + kind[None, :], mask=both, other=-1)
    fits = tl.abs(v) <= 32767.0
    tl.store(symbols + start + (j - first)[None, :], tl.where(fits, v, 0.0).to(tl.int16), mask=start >= 0)
    # Flat: the compiler for sm100 fails where a product is reduced along an axis.
    peak = tl.max(tl.reshape(tl.where(start >= 0, tl.abs(v), 0.0), (BLOCK_R * BLOCK_T,)), 0)
    tl.store(largest + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), peak)
