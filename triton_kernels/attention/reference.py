"""Naive attention of chosen rows, the reference that the fast paths are tested against."""

import torch
from torch import Tensor


def row_attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention in float64: q [B, Hq, N, D], k [B, H, T, D], v [B, H, T, Dv], mask [B or 1, 1, N, T] additive."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.transpose(2, 3) * scale + mask.double()
    return torch.softmax(scores, -1) @ v
