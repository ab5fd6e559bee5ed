"""Naive attention of chosen rows, the reference that the fast paths are tested against."""

import torch
from torch import Tensor


def row_attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention in float64: q [B, Hq, N, D], k [B, H, T, D], v [B, H, T, Dv], mask [B or 1, 1, N, T] additive."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.transpose(2, 3) * scale + mask.double()
    return torch.softmax(scores, -1) @ v


def visible_keys(positions: Tensor, keys: int, window: int | None = None) -> Tensor:
    """[B, N, T] bool: rows at positions [B, N] see keys up to themselves, the last `window` of these."""
    kp = torch.arange(keys, device=positions.device)
    seen = kp <= positions[..., None]
    return seen if window is None else seen & (positions[..., None] - kp < window)


def dense(cache: Tensor, block_table: Tensor) -> Tensor:
    """Keys of sequences [B, H, M * block size, D], of a cache [blocks, block size, H, D] and a block table [B, M]."""
    pages = cache[block_table.long()]
    return pages.flatten(1, 2).transpose(1, 2)


def selective_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention in float64: (out [B, Hq, N, Dv], log-sum-exp [B, Hq, N], mean weight of each key [B, Hq, T]).

    Rows that see nothing give zeros.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if mask is not None:
        scores = scores + mask.double()
    scores = scores.masked_fill(~visible_keys(positions, k.shape[2], window)[:, None], -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])
    return weights @ v, lse, weights.mean(2)
