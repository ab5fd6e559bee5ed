"""Attention of chosen rows on CPU.

Rows are ascending, so the keys of a block of rows end at the block's last row: cutting them there skips most of the
masked work (a third less time than one masked call on CPU, and exact, since only masked keys are cut).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lmcache_blend.triton_kernels.attention.reference import visible_keys

BLOCK_ROWS = 64
PROBE_ROWS = 64
"""Rows of a probe whose weights are in memory at a time; fewer at a time cost more."""


def masked_rows(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, last: Sequence[int], scale: float | None, block: int
) -> Tensor:
    """`ops.row_attention`, by scaled_dot_product_attention over blocks of rows."""
    n, gqa = q.shape[2], q.shape[1] != k.shape[1]
    if n <= block:
        end = last[-1] + 1
        return F.scaled_dot_product_attention(
            q, k[:, :, :end], v[:, :, :end], attn_mask=mask[..., :end], scale=scale, enable_gqa=gqa
        )
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    for a in range(0, n, block):
        b = min(a + block, n)
        end = last[b - 1] + 1
        out[:, :, a:b] = F.scaled_dot_product_attention(
            q[:, :, a:b],
            k[:, :, :end],
            v[:, :, :end],
            attn_mask=mask[:, :, a:b, :end],
            scale=scale,
            enable_gqa=gqa,
        )
    return out


def weigh(q: Tensor, k: Tensor, mask: Tensor, scale: float, soft_cap: float | None) -> tuple[Tensor, Tensor]:
    """float32 weights [B, H, G, N, T] and their log-sum-exp [B, H, G, N, 1]; mask [B or 1, 1, 1, N, T], additive.

    Query heads that share a KV head are folded into its rows, so that K and V are never repeated.
    """
    b, hq, n, d = q.shape
    h, t = k.shape[1], k.shape[2]
    folded = q.reshape(b, h, hq // h * n, d) * scale
    scores = torch.matmul(folded, k.transpose(2, 3)).view(b, h, hq // h, n, t).float()
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores + mask
    lse = torch.logsumexp(scores, -1, keepdim=True)
    return torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)), lse


def selected_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """`ops.selective_attention` of dense keys: (out [B, Hq, N, Dv], log-sum-exp [B, Hq, N] or nothing)."""
    b, hq, n, _ = q.shape
    out = q.new_empty(b, n, hq, v.shape[-1]).transpose(1, 2)
    sums = q.new_empty((b, n, hq), dtype=torch.float32).transpose(1, 2) if need_lse else q.new_empty(0).float()
    # Products of 16-bit matrices are several times slower than casting both, on CPUs without AMX.
    q, k, v = q.float(), k.float(), v.float()
    for i in range(0, n, BLOCK_ROWS):
        rows = slice(i, i + BLOCK_ROWS)
        end = min(int(positions[:, rows].max()) + 1, k.shape[2])
        hidden = additive(positions[:, rows], end, window, mask, rows)
        if need_lse or soft_cap is not None:
            weights, lse = weigh(q[:, :, rows], k[:, :, :end], hidden, scale, soft_cap)
            out[:, :, rows] = _mix(weights, v[:, :, :end])
            if need_lse:
                sums[:, :, rows] = lse.reshape(sums[:, :, rows].shape)
        else:
            part = F.scaled_dot_product_attention(
                q[:, :, rows], k[:, :, :end], v[:, :, :end], hidden[:, 0], scale=scale, enable_gqa=True
            )
            nothing = (positions[:, rows] < 0)[:, None, :, None]
            out[:, :, rows] = torch.where(nothing, 0.0, part)
    return out, sums


def key_mass(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """`ops.attention_mass` of dense keys: mean weight of each key [B, Hq, T]."""
    n, mass = q.shape[2], q.new_zeros(*q.shape[:2], k.shape[2], dtype=torch.float32)
    q, k = q.float(), k.float()
    for i in range(0, n, PROBE_ROWS):
        rows = slice(i, i + PROBE_ROWS)
        weights, _ = weigh(
            q[:, :, rows], k, additive(positions[:, rows], k.shape[2], window, mask, rows), scale, soft_cap
        )
        mass += weights.sum(3).flatten(1, 2)
    return mass / n


def probe_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """`ops.row_attention_mass`: (out [B, Hq, N, Dv], mean weight of each key [B, Hq, T])."""
    b, hq, n, d = q.shape
    h, t = k.shape[1], k.shape[2]
    group = hq // h
    out, mass = q.new_empty(b, hq, n, v.shape[-1]), q.new_zeros(b, hq, t, dtype=torch.float32)
    for i in range(0, n, PROBE_ROWS):
        part = q[:, :, i : i + PROBE_ROWS] * (d**-0.5 if scale is None else scale)
        m = part.shape[2]
        scores = torch.matmul(part.reshape(b, h, group * m, d), k.transpose(2, 3)).view(b, h, group, m, t)
        scores += mask[:, :, None, i : i + PROBE_ROWS]
        weights = torch.softmax(scores, -1, dtype=torch.float32)
        out[:, :, i : i + PROBE_ROWS] = _mix(weights, v)
        mass += weights.sum(3).view(b, hq, t)
    return out, mass / n


def additive(positions: Tensor, keys: int, window: int | None, mask: Tensor | None, rows: slice) -> Tensor:
    """[B, 1, 1, N, T] of zeros and -inf, with the rows of `mask` added."""
    seen = visible_keys(positions, keys, window)[:, None, None]
    zero = torch.zeros((), device=seen.device) if mask is None else mask[:, :, None, rows, :keys].float()
    return torch.where(seen, zero, -torch.inf)


def _mix(weights: Tensor, v: Tensor) -> Tensor:
    b, h, g, n, t = weights.shape
    out = torch.matmul(weights.to(v.dtype).view(b, h, g * n, t), v)
    return out.view(b, h * g, n, v.shape[-1])
