"""Attention of chosen rows: checks and dispatch.

`selective_attention` and `attention_mass` know rows by their positions, for dense and paged keys. `row_attention` and
`row_attention_mass` take a model's own additive mask (Hugging Face); on a GPU they are the same kernels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lmcache_blend.triton_kernels.attention import cpu
from lmcache_blend.triton_kernels.attention.reference import dense
from lmcache_blend.triton_kernels.attention.settings import attention_settings, mass_settings
from lmcache_blend.triton_kernels.launch import launch, on_triton
from lmcache_blend.triton_kernels.operator import operator
from lmcache_blend.triton_kernels.paged.ops import Layout, nhd
from lmcache_blend.triton_kernels.rotation.ops import power_of_2


def selective_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    block_table: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    layout: Layout = "NHD",
) -> Tensor:
    """Attention of N rows at positions [B, N] over all keys up to their positions, [B, Hq, N, Dv].

    q [B, Hq, N, D]; dense k [B, H, T, D], v [B, H, T, Dv], or, with a block_table [B, M], caches [blocks, block size,
    H, D], where "HND" [blocks, H, block size, D]. window: only the last so many keys. soft_cap: of the logits (Gemma).
    mask [B or 1, 1, N, T]: added to the logits. Rows that see nothing (position -1) give zeros. Fastest where positions
    ascend. Raises ValueError where shapes do not fit.
    """
    k, v = (k, v) if block_table is None else (nhd(k, layout), nhd(v, layout))
    return _attention(q, k, v, positions, block_table, mask, _scale(q, scale), window, soft_cap, False)[0]


def selective_attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    block_table: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    layout: Layout = "NHD",
) -> tuple[Tensor, Tensor]:
    """`selective_attention` and its log-sum-exp [B, Hq, N] float32, -inf for rows that see nothing."""
    k, v = (k, v) if block_table is None else (nhd(k, layout), nhd(v, layout))
    return _attention(q, k, v, positions, block_table, mask, _scale(q, scale), window, soft_cap, True)


def attention_mass(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    lse: Tensor,
    keys: int,
    block_table: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    layout: Layout = "NHD",
) -> Tensor:
    """How much N rows attend to each of the first `keys` keys, [B, Hq, keys] float32, mean over the rows.

    lse: of `selective_attention_lse` with the same arguments; the N x T weights are never in memory.
    """
    k = k if block_table is None else nhd(k, layout)
    return _mass(q, k, positions, lse, keys, block_table, mask, _scale(q, scale), window, soft_cap)


def row_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    last: Sequence[int],
    scale: float | None,
    block: int = cpu.BLOCK_ROWS,
) -> Tensor:
    """Attention of N rows over T keys.

    q [B, Hq, N, D], k [B, H, T, D], v [B, H, T, Dv]; mask [B or 1, 1, N, T], additive, exact by position; last: for
    each of the N rows its position (the largest over the batch), ascending. Returns [B, Hq, N, Dv]. Where gradients are
    wanted, and on CPU, it is torch's own attention.
    """
    if on_triton(q, k, v, mask) and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)):
        return selective_attention(q, k, v, _same_rows(q, last), mask=mask, scale=scale)
    return cpu.masked_rows(q, k, v, mask, last, scale, block)


def row_attention_mass(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, last: Sequence[int], scale: float | None
) -> tuple[Tensor, Tensor]:
    """`row_attention` of a probe, and how much its rows attend to each key, [B, Hq, T] float32, mean over the rows."""
    if not on_triton(q, k, v, mask):
        return cpu.probe_rows(q, k, v, mask, scale)
    positions = _same_rows(q, last)
    out, lse = selective_attention_lse(q, k, v, positions, mask=mask, scale=scale)
    return out, attention_mass(q, k, positions, lse, k.shape[2], mask=mask, scale=scale)


def _same_rows(q: Tensor, last: Sequence[int]) -> Tensor:
    return torch.tensor(last, device=q.device).expand(q.shape[0], -1)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _check(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    block_table: Tensor | None,
    mask: Tensor | None,
    window: int | None,
    soft_cap: float | None,
) -> tuple[int, int]:
    """(H, keys that there are); raises ValueError."""
    b, hq, n, d = q.shape
    if block_table is None:
        batch, heads, keys = k.shape[:3]
    else:
        batch, heads, keys = b, k.shape[2], block_table.shape[-1] * k.shape[1]
    if batch != b or hq % heads or k.shape[3] != d or k.dtype != q.dtype:
        raise ValueError(f"q {tuple(q.shape)} {q.dtype} does not fit keys {tuple(k.shape)} {k.dtype}")
    if positions.shape != (b, n):
        raise ValueError(f"positions {tuple(positions.shape)} do not fit {b} sequences of {n} rows")
    if block_table is not None and (block_table.dim() != 2 or len(block_table) != b):
        raise ValueError(f"a block table of shape {tuple(block_table.shape)} does not fit {b} sequences")
    if mask is not None and (mask.dim() != 4 or mask.shape[0] not in (1, b) or mask.shape[1:] != (1, n, keys)):
        raise ValueError(f"a mask of shape {tuple(mask.shape)} does not fit {b} sequences, {n} rows and {keys} keys")
    if (window is not None and window < 1) or (soft_cap is not None and soft_cap <= 0):
        raise ValueError(f"window = {window}, soft_cap = {soft_cap}: both must be positive, or None")
    return heads, keys


def _run_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    block_table: Tensor | None,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    heads, keys = _check(q, k, positions, block_table, mask, window, soft_cap)
    if k.shape[:3] != v.shape[:3] or k.dtype != v.dtype:
        raise ValueError(f"k {tuple(k.shape)} {k.dtype} does not fit v {tuple(v.shape)} {v.dtype}")
    if not on_triton(q, k, v, positions, block_table, mask):
        if block_table is not None:
            k, v = dense(k, block_table), dense(v, block_table)
        return cpu.selected_rows(q, k, v, positions, mask, scale, window, soft_cap, need_lse)
    from lmcache_blend.triton_kernels.attention.kernels import attention_kernel, merge_kernel

    q, k, v, mask, positions = (_dims_contiguous(x) for x in (q, k, v, mask, positions))  # pyright: ignore[reportAssignmentType]
    b, hq, n, d = q.shape
    dv = v.shape[3]
    how = attention_settings(b, heads, hq // heads, n, keys, max(d, dv), q.element_size() * 8)
    out = q.new_empty(b, n, hq, dv)
    lse = q.new_empty((b, n, hq) if need_lse else (0,), dtype=torch.float32)
    parts = q.new_empty(how.splits, b, n, hq, dv, dtype=torch.float32) if how.splits > 1 else out
    sums = q.new_empty(how.splits, b, n, hq, dtype=torch.float32) if how.splits > 1 else lse if need_lse else None
    wide, size = power_of_2(dv), 0 if block_table is None else k.shape[1]
    strides, other = _strides(k, size), _strides(v, size)
    if strides == other:
        other = (None, None, None)
    launch(
        attention_kernel, (-(-n * (hq // heads) // how.rows), heads * how.splits, b), q, k, v, positions, block_table,
        mask, parts, sums, n, keys, window, scale, soft_cap, *q.stride()[:3], *strides, *other,
        positions.stride(0), 0 if block_table is None else block_table.stride(0), *_mask_strides(mask),
        HEADS=heads, G=hq // heads, D=d, DV=dv, PD=power_of_2(d), PDV=wide, SIZE=size, BLOCK_M=how.rows,
        BLOCK_N=how.keys, SPLITS=how.splits, PRECISION="ieee", num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    if how.splits > 1:
        rows = b * n * hq
        block = max(1, 2048 // wide)
        launch(
            merge_kernel, (-(-rows // block),), parts, sums, out, lse if need_lse else None, rows, DV=dv, PDV=wide,
            SPLITS=how.splits, BLOCK_M=block,
        )  # fmt: skip
    return out.transpose(1, 2), lse.transpose(1, 2) if need_lse else lse


def _run_mass(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    lse: Tensor,
    keys: int,
    block_table: Tensor | None,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    heads, limit = _check(q, k, positions, block_table, mask, window, soft_cap)
    if not 0 < keys <= limit or lse.shape != q.shape[:3]:
        raise ValueError(f"{keys} of {limit} keys, log-sum-exp {tuple(lse.shape)} for rows {tuple(q.shape)}")
    if not on_triton(q, k, positions, lse, block_table, mask):
        k = k if block_table is None else dense(k, block_table)
        return cpu.key_mass(q, k[:, :, :keys], positions, lse, mask, scale, window, soft_cap)
    from lmcache_blend.triton_kernels.attention.kernels import mass_kernel

    q, k, mask, positions = (_dims_contiguous(x) for x in (q, k, mask, positions))  # pyright: ignore[reportAssignmentType]
    b, hq, n, d = q.shape
    size, how = 0 if block_table is None else k.shape[1], mass_settings(n, d, q.element_size() * 8)
    mass = q.new_empty(b, hq, keys, dtype=torch.float32)
    launch(
        mass_kernel, (-(-keys // how.keys), heads, b), q, k, positions, block_table, mask,
        lse.transpose(1, 2).contiguous(), mass, n, keys, window, scale, soft_cap, *q.stride()[:3], *_strides(k, size),
        positions.stride(0), 0 if block_table is None else block_table.stride(0), *_mask_strides(mask),
        HEADS=heads, G=hq // heads, D=d, PD=power_of_2(d), SIZE=size, BLOCK_M=how.rows, BLOCK_N=how.keys,
        PRECISION="ieee", num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    return mass


def _dims_contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor, size: int) -> tuple[int, int, int]:
    """Of (block or sequence, token, head)."""
    return (x.stride(0), x.stride(1), x.stride(2)) if size else (x.stride(0), x.stride(2), x.stride(1))


def _mask_strides(mask: Tensor | None) -> tuple[int, int]:
    """Of (sequence, row); one mask may serve all sequences."""
    return (0, 0) if mask is None else (mask.stride(0) if len(mask) > 1 else 0, mask.stride(2))


def _fake_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    block_table: Tensor | None,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    b, hq, n, _ = q.shape
    sums = q.new_empty((b, n, hq) if need_lse else (0,), dtype=torch.float32)
    return q.new_empty(b, n, hq, v.shape[3]).transpose(1, 2), sums.transpose(1, 2) if need_lse else sums


def _fake_mass(q: Tensor, k: Tensor, positions: Tensor, lse: Tensor, keys: int, *_: object) -> Tensor:
    return q.new_empty(*q.shape[:2], keys, dtype=torch.float32)


_attention = operator("selective_attention", _run_attention, _fake_attention)
_mass = operator("attention_mass", _run_mass, _fake_mass)
