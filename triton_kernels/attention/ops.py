"""Attention of chosen rows: dispatch and the CPU path.

Rows are ascending, so the keys of a block of rows end at the block's last row: cutting them there skips most of the
masked work (a third less time than one masked call on CPU, and exact, since only masked keys are cut).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 64


def row_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, last: Sequence[int], scale: float | None, block: int = BLOCK_ROWS
) -> Tensor:
    """Attention of N rows over T keys.

    q [B, Hq, N, D], k [B, H, T, D], v [B, H, T, Dv]; mask [B or 1, 1, N, T], additive, exact by position; last: for
    each of the N rows its position (the largest over the batch), ascending. Returns [B, Hq, N, Dv].
    """
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


def attention_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attention with its weights, for probes of few rows: (out [B, Hq, N, Dv], weights [B, Hq, N, T]).

    Query heads that share a KV head are folded into its rows, so that K and V are never repeated.
    """
    b, hq, n, d = q.shape
    h, t = k.shape[1], k.shape[2]
    group = hq // h
    folded = q.reshape(b, h, group * n, d) * (d**-0.5 if scale is None else scale)
    scores = torch.matmul(folded, k.transpose(2, 3)).view(b, h, group, n, t)
    scores += mask[:, :, None]
    weights = torch.softmax(scores, -1, dtype=torch.float32)
    out = torch.matmul(weights.to(v.dtype).view(b, h, group * n, t), v)
    return out.view(b, hq, n, v.shape[-1]), weights.view(b, hq, n, t)
