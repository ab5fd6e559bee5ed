"""Rotation on a GPU. The helpers that load, turn and store pairs of dims serve the paged kernels too.

A pair is (a, b) of one rotary frequency: dims i and i + R/2 (neox), or 2i and 2i + 1 (gptj). Tiles are [tokens, R/2],
padded to a power of two, in float32.
"""

import triton
import triton.language as tl

FORWARD, INVERSE, MOVE = 0, 1, 2


@triton.jit
def load_pairs(row, i, mask, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """a and b of pairs i [P] < HALF that begin at pointers row [BT]; mask [BT]."""
    if INTERLEAVED:
        j = tl.arange(0, 2 * i.shape[0])
        x = tl.load(row[:, None] + j[None, :], mask=mask[:, None] & (j < 2 * HALF)[None, :], other=0.0)
        a, b = tl.split(tl.reshape(x, (row.shape[0], i.shape[0], 2)))
    else:
        inside = mask[:, None] & (i < HALF)[None, :]
        a = tl.load(row[:, None] + i[None, :], mask=inside, other=0.0)
        b = tl.load(row[:, None] + HALF + i[None, :], mask=inside, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_pairs(row, a, b, i, mask, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The reverse of load_pairs, in the dtype of the pointers."""
    dtype = row.dtype.element_ty
    if INTERLEAVED:
        j = tl.arange(0, 2 * i.shape[0])
        x = tl.reshape(tl.join(a.to(dtype), b.to(dtype)), (row.shape[0], 2 * i.shape[0]))
        tl.store(row[:, None] + j[None, :], x, mask=mask[:, None] & (j < 2 * HALF)[None, :])
    else:
        inside = mask[:, None] & (i < HALF)[None, :]
        tl.store(row[:, None] + i[None, :], a.to(dtype), mask=inside)
        tl.store(row[:, None] + HALF + i[None, :], b.to(dtype), mask=inside)


@triton.jit
def load_turn(cos, sin, old_cos, old_sin, t, stride, i, mask, HALF: tl.constexpr, MODE: tl.constexpr):
    """cos and sin [BT, P] to turn by: of the tables, of their inverse, or from the old tables to these."""
    at = t.to(tl.int64)[:, None] * stride + i[None, :]
    inside = mask[:, None] & (i < HALF)[None, :]
    c = tl.load(cos + at, mask=inside, other=1.0).to(tl.float32)
    s = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)
    if MODE == 1:
        norm = c * c + s * s
        c, s = c / norm, -s / norm
    if MODE == 2:
        oc = tl.load(old_cos + at, mask=inside, other=1.0).to(tl.float32)
        os = tl.load(old_sin + at, mask=inside, other=0.0).to(tl.float32)
        norm = oc * oc + os * os
        c, s = (c * oc + s * os) / norm, (s * oc - c * os) / norm
    return c, s


@triton.jit
def copy_rest(source, target, readable, mask, FIRST: tl.constexpr, LAST: tl.constexpr, D: tl.constexpr):
    """Copy the dims of rows of D that lie outside FIRST..LAST, from pointers source [BT] to target [BT].

    mask: rows that are written; those that are not readable become zeros.
    """
    if FIRST > 0:
        copy_dims(source, target, readable, mask, FIRST)
    if LAST < D:
        copy_dims(source + LAST, target + LAST, readable, mask, D - LAST)


@triton.jit
def copy_dims(source, target, readable, mask, N: tl.constexpr):
    j = tl.arange(0, triton.next_power_of_2(N))
    inside = (j < N)[None, :]
    x = tl.load(source[:, None] + j[None, :], mask=readable[:, None] & inside, other=0.0)
    tl.store(target[:, None] + j[None, :], x.to(target.dtype.element_ty), mask=mask[:, None] & inside)


@triton.jit
def rotate_kernel(
    x, out, cos, sin, old_cos, old_sin, tokens, heads, x_h, x_t, table_t,
    D: tl.constexpr, FIRST: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    MODE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """x [H, T, D] by strides x_h, x_t -> out [H, T, D] contiguous; tables [T, HALF] by stride table_t."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = t < tokens
    i = tl.arange(0, PAIRS)
    c, s = load_turn(cos, sin, old_cos, old_sin, t, table_t, i, mask, HALF, MODE)
    first_head = tl.program_id(1) * BLOCK_H
    for h in range(first_head, tl.minimum(first_head + BLOCK_H, heads)):
        source = x + tl.cast(h, tl.int64) * x_h + t.to(tl.int64) * x_t
        target = out + (tl.cast(h, tl.int64) * tokens + t) * D
        a, b = load_pairs(source + FIRST, i, mask, HALF, INTERLEAVED)
        store_pairs(target + FIRST, a * c - b * s, b * c + a * s, i, mask, HALF, INTERLEAVED)
        copy_rest(source, target, mask, mask, FIRST, FIRST + 2 * HALF, D)
