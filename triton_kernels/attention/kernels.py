"""Attention of chosen rows on a GPU: flash attention (arXiv 2205.14135) whose causal mask goes by position.

A program takes BLOCK_M rows of one KV head: a row is one query head of one chosen token, so that the G query heads of a
KV head share its tiles. Keys that every row sees need no mask, those behind the largest position are not read at all;
sorted positions make tiles of nearly equal rows. SPLITS programs share the keys of a tile where there are few rows;
their results, each with its log-sum-exp in base 2, are merged by merge_kernel.

Keys are dense [B, H, T, D] by strides (table None) or paged [blocks, SIZE, H, D] under table [B, M]. V's strides are
None where they are K's. Masks are additive.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def key_blocks(table, kp, inside, batch, SIZE: tl.constexpr):
    """(block, place in it) of keys kp of a sequence whose table begins at `table`; a dense batch is blocks itself."""
    if table is None:
        block, place = batch.to(tl.int64), kp
    else:
        block, place = tl.load(table + kp // SIZE, mask=inside, other=0).to(tl.int64), kp % SIZE
    return block, place


@triton.jit
def logits(s, scale, soft_cap):
    """Dot products -> logits in base 2: scaled, and capped by tanh where there is a cap (Gemma 2)."""
    if soft_cap is not None:
        # tanh(x) = 1 - 2 / (e^2x + 1): libdevice's is not portable
        s = soft_cap * (1.0 - 2.0 / (tl.exp2(s * (scale / soft_cap) * (2.0 * LOG2E)) + 1.0))
        return s * LOG2E
    return s * (scale * LOG2E)


@triton.jit
def visible(kp, position, window):
    """Whether rows at `position` see keys kp (shapes that broadcast)."""
    if window is None:
        seen = kp <= position
    else:
        # One comparison: keys behind the position are huge as unsigned numbers. AMD keeps masks in scarce registers.
        seen = (position - kp).to(tl.uint32, bitcast=True) < window
    return seen


@triton.jit
def additive(at, inside):
    """A mask's values in base 2, the smallest finite: rows that it hides entirely attend evenly, as in torch."""
    return tl.maximum(tl.load(at, mask=inside, other=0.0).to(tl.float32), -1e30) * LOG2E


@triton.jit
def tiles(
    acc, total, peak, q, qi, in_rows, position, k, v, table, mask, begin, end, limit, batch, window, scale, soft_cap,
    k_block, k_token, v_block, v_token, mask_row,
    D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDV: tl.constexpr, SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys begin..end."""
    d, dv = tl.arange(0, PD), tl.arange(0, PDV)
    for n in range(begin, end, BLOCK_N):
        kp = n + tl.arange(0, BLOCK_N)
        inside = kp < end
        block, place = key_blocks(table, kp, inside, batch, SIZE)
        at = block * k_block + place.to(tl.int64) * k_token
        k_at, v_at = k + at, v + at
        if v_block is not None:
            v_at = v + block * v_block + place.to(tl.int64) * v_token
        if MASKED:
            kt = tl.load(k_at[None, :] + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
        elif D == PD:
            kt = tl.load(k_at[None, :] + d[:, None])
        else:
            kt = tl.load(k_at[None, :] + d[:, None], mask=(d < D)[:, None], other=0.0)
        s = logits(tl.dot(q, kt, input_precision=PRECISION), scale, soft_cap)
        if MASKED:
            # Keys from `end` on are multiples of BLOCK_N away or behind every position.
            seen = visible(kp[None, :], position[:, None], window)
            if mask is not None:
                m = mask + qi.to(tl.int64)[:, None] * mask_row + kp[None, :]
                s += additive(m, in_rows[:, None] & (kp < limit)[None, :])
            s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(peak, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - safe[:, None])
        fade = tl.exp2(peak - safe)
        total = total * fade + tl.sum(p, 1)
        if MASKED:
            vt = tl.load(v_at[:, None] + dv[None, :], mask=inside[:, None] & (dv < DV)[None, :], other=0.0)
        elif DV == PDV:
            vt = tl.load(v_at[:, None] + dv[None, :])
        else:
            vt = tl.load(v_at[:, None] + dv[None, :], mask=(dv < DV)[None, :], other=0.0)
        acc = tl.dot(p.to(vt.dtype), vt, acc * fade[:, None], input_precision=PRECISION)
        peak = new
    return acc, total, peak


@triton.jit
def attention_kernel(
    q, k, v, positions, table, mask, out, lse, count, limit, window, scale, soft_cap,
    q_batch, q_head, q_row, k_block, k_token, k_head, v_block, v_token, v_head, p_batch, t_batch, mask_batch, mask_row,
    HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDV: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [SPLITS, B, N, HEADS * G, DV], lse [SPLITS, B, N, HEADS * G] in base 2 (natural if SPLITS is 1) or None."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last rows have most keys: begin with them
    head, split = tl.program_id(1) % HEADS, tl.program_id(1) // HEADS
    batch = tl.program_id(2)
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    qi, g = r // G, head * G + r % G
    in_rows = qi < count
    position = tl.load(positions + batch.to(tl.int64) * p_batch + qi, mask=in_rows, other=-1).to(tl.int32)
    position = tl.minimum(position, limit - 1)
    d, dv = tl.arange(0, PD), tl.arange(0, PDV)
    q_at = q + batch.to(tl.int64) * q_batch + qi.to(tl.int64) * q_row + g * q_head
    qt = tl.load(q_at[:, None] + d[None, :], mask=in_rows[:, None] & (d < D)[None, :], other=0.0)
    end = tl.max(position, 0) + 1
    everyone = tl.min(tl.where(in_rows, position, limit), 0) + 1  # keys that every row sees
    begin = 0
    if window is not None:
        begin = tl.maximum(everyone - window, 0) // BLOCK_N * BLOCK_N
    if SPLITS > 1:
        span = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), SPLITS), BLOCK_N) * BLOCK_N
        begin += split * span
        end = tl.minimum(end, begin + span)
    free = begin
    if mask is None and window is None:
        free = tl.maximum(tl.minimum(everyone // BLOCK_N * BLOCK_N, end // BLOCK_N * BLOCK_N), begin)
    if table is not None:
        table += batch.to(tl.int64) * t_batch
    if mask is not None:
        mask += batch.to(tl.int64) * mask_batch
    k += tl.cast(head, tl.int64) * k_head
    v += tl.cast(head, tl.int64) * (k_head if v_head is None else v_head)
    acc = tl.zeros((BLOCK_M, PDV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if mask is None and window is None:
        acc, total, peak = tiles(
            acc, total, peak, qt, qi, in_rows, position, k, v, table, mask, begin, free, limit, batch, window, scale,
            soft_cap, k_block, k_token, v_block, v_token, mask_row, D, DV, PD, PDV, SIZE, BLOCK_N, False, PRECISION,
        )  # fmt: skip
    acc, total, peak = tiles(
        acc, total, peak, qt, qi, in_rows, position, k, v, table, mask, free, end, limit, batch, window, scale,
        soft_cap, k_block, k_token, v_block, v_token, mask_row, D, DV, PD, PDV, SIZE, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    nothing = total == 0.0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    row = ((split * tl.num_programs(2) + batch).to(tl.int64) * count + qi) * (HEADS * G) + g
    tl.store(
        out + row[:, None] * DV + dv[None, :],
        acc.to(out.dtype.element_ty),
        mask=in_rows[:, None] & (dv < DV)[None, :],
    )
    if lse is not None:
        value = peak + tl.log2(tl.where(nothing, 1.0, total))
        if SPLITS == 1:
            value = value / LOG2E
        tl.store(lse + row, value, mask=in_rows)


@triton.jit
def merge_kernel(
    parts, part_lse, out, lse, rows, DV: tl.constexpr, PDV: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """parts [SPLITS, R, DV] with base-2 part_lse [SPLITS, R] -> out [R, DV], natural lse [R] or None."""
    r = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    dv = tl.arange(0, PDV)
    in_rows = r < rows
    inside = in_rows[:, None] & (dv < DV)[None, :]
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for i in range(SPLITS):
        peak = tl.maximum(peak, tl.load(part_lse + i * rows.to(tl.int64) + r, mask=in_rows, other=float("-inf")))
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    acc = tl.zeros((BLOCK_M, PDV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for i in range(SPLITS):
        at = i * rows.to(tl.int64) + r
        weight = tl.exp2(tl.load(part_lse + at, mask=in_rows, other=float("-inf")) - safe)
        acc += weight[:, None] * tl.load(parts + at[:, None] * DV + dv[None, :], mask=inside, other=0.0)
        total += weight
    nothing = total == 0.0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    tl.store(out + r[:, None] * DV + dv[None, :], acc.to(out.dtype.element_ty), mask=inside)
    if lse is not None:
        tl.store(lse + r, (peak + tl.log2(tl.where(nothing, 1.0, total))) / LOG2E, mask=in_rows)


@triton.jit
def mass_kernel(
    q, k, positions, table, mask, lse, mass, count, keys, window, scale, soft_cap,
    q_batch, q_head, q_row, k_block, k_token, k_head, p_batch, t_batch, mask_batch, mask_row,
    HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PD: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """mass [B, HEADS * G, keys]: attention of the rows to each key, mean over rows; natural lse [B, N, HEADS * G]."""
    kp = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head, batch = tl.program_id(1), tl.program_id(2)
    inside = kp < keys
    d = tl.arange(0, PD)
    if table is not None:
        table += batch.to(tl.int64) * t_batch
    block, place = key_blocks(table, kp, inside, batch, SIZE)
    k_at = k + tl.cast(head, tl.int64) * k_head + block * k_block + place.to(tl.int64) * k_token
    kt = tl.load(k_at[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    for g in range(head * G, head * G + G):
        heard = tl.zeros((BLOCK_N,), tl.float32)
        for n in range(0, count, BLOCK_M):
            qi = n + tl.arange(0, BLOCK_M)
            in_rows = qi < count
            position = tl.load(positions + batch.to(tl.int64) * p_batch + qi, mask=in_rows, other=-1).to(tl.int32)
            q_at = q + batch.to(tl.int64) * q_batch + tl.cast(g, tl.int64) * q_head + qi.to(tl.int64) * q_row
            qt = tl.load(q_at[None, :] + d[:, None], mask=in_rows[None, :] & (d < D)[:, None], other=0.0)
            s = logits(tl.dot(kt, qt, input_precision=PRECISION), scale, soft_cap)
            within = in_rows[None, :] & inside[:, None]
            if mask is not None:
                m = mask + batch.to(tl.int64) * mask_batch + qi.to(tl.int64)[None, :] * mask_row + kp[:, None]
                s += additive(m, within)
            at = (batch.to(tl.int64) * count + qi) * (HEADS * G) + g
            sums = tl.load(lse + at, mask=in_rows, other=float("-inf")) * LOG2E
            sums = tl.where(sums == float("-inf"), float("inf"), sums)  # rows that see nothing
            seen = within & visible(kp[:, None], position[None, :], window)
            heard += tl.sum(tl.where(seen, tl.exp2(s - sums[None, :]), 0.0), 1)
        tl.store(mass + (batch.to(tl.int64) * (HEADS * G) + g) * keys + kp, heard / count, mask=inside)
