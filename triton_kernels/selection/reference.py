"""Deviation and top-k in plain torch: any dtype, any device."""

import torch
from torch import Tensor


def squared_deviation_reference(new: Tensor, old: Tensor, rows: Tensor) -> Tensor:
    """[2, N]: sums over heads and dims of (new - old)^2 and of new^2; new [H, N, D], old [H, T, D] at rows [N].

    In float64 where `new` is, else in float32.
    """
    wide = torch.promote_types(new.dtype, torch.float32)
    new = new.to(wide)
    return torch.stack(((new - old[:, rows].to(wide)).square().sum((0, 2)), new.square().sum((0, 2))))


def top_rows_reference(scores: Tensor, candidate: Tensor, count: int) -> Tensor:
    """Ascending positions of the `count` candidates [T] with the highest scores [T]; of equal ones the first."""
    at = candidate.nonzero().flatten()
    return at[scores[at].float().argsort(descending=True, stable=True)[:count]].sort().values
