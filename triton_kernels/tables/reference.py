"""Tables in plain numpy and torch."""

import numpy as np
import torch
from torch import Tensor


def histogram_reference(q: Tensor, reach: int) -> Tensor:
    """[R, T] -> [R, 2 reach + 1] float32 counts of -reach..reach, larger values counted at the ends."""
    values = torch.arange(-reach, reach + 1, device=q.device)
    return (q.clamp(-reach, reach)[:, :, None] == values).sum(1).to(torch.float32)


def normalise(p: np.ndarray, bits: int) -> np.ndarray:
    """Weights [n] >= 0 -> uint16 integers that sum to 2^bits, at least 1 where the weight is not 0."""
    total, p = 1 << bits, np.asarray(p, np.float64)
    if not p.any():
        p = np.eye(1, len(p))[0]
    ideal = p / p.sum() * total
    out = np.where(p > 0, np.maximum(1, np.floor(ideal)), 0).astype(np.int64)
    while (left := total - int(out.sum())) != 0:
        # One unit more shortens the code by p log(1 + 1/f), one less lengthens it by p log(f / (f - 1)).
        if left > 0:
            gain = np.where(p > 0, p * np.log1p(1 / np.maximum(out, 1)), -1)
            out[np.argsort(-gain, kind="stable")[: min(left, int((p > 0).sum()))]] += 1
        else:
            loss = np.where(out > 1, -p * np.log1p(-1 / np.maximum(out, 2)), np.inf)
            out[np.argsort(loss, kind="stable")[: min(-left, int((out > 1).sum()))]] -= 1
    return out.astype(np.uint16)


def frequencies_reference(counts: Tensor, bits: int) -> Tensor:
    """`normalise` of every row of counts [n, A]."""
    rows = [normalise(row, bits) for row in counts.cpu().numpy()]
    return torch.from_numpy(np.stack(rows) if rows else np.zeros(counts.shape, np.uint16)).to(counts.device)


def slots_reference(freq: Tensor, bits: int) -> Tensor:
    """As `ops.slots`."""
    f = freq.to(torch.int64)
    rows = []
    for row in f:
        symbol = torch.repeat_interleave(torch.arange(row.shape[0], device=row.device), row)
        start = torch.cumsum(row, 0) - row
        slot = torch.arange(1 << bits, device=row.device)
        rows.append((row[symbol] - 1) << 20 | (slot - start[symbol]) << 8 | symbol)
    return torch.stack(rows).to(torch.uint32)
