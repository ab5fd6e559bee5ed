"""Transforms in plain torch: the CPU path in the matrices' dtype, the reference in float64."""

import torch
from torch import Tensor


def places(order: Tensor, bounds: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """(class of each token in `order` [T], place of each coefficient's symbol [R, T], negative where it has none)."""
    j = torch.arange(len(order), device=order.device)
    kind = torch.searchsorted(bounds[1:], j, right=True)
    start = offsets[:, kind]
    return kind, torch.where(start >= 0, start + (j - bounds[kind]), -1)


def synthesise_reference(
    symbols: Tensor, order: Tensor, bounds: Tensor, offsets: Tensor, steps: Tensor, inverse: Tensor, base: Tensor,
    features: Tensor, predict: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `ops.synthesise`; in float64 where `inverse` is."""
    wide = torch.promote_types(inverse.dtype, torch.float32)
    kind, at = places(order, bounds, offsets)
    flat = torch.cat((symbols, symbols.new_zeros(1)))  # -1 reads a zero
    parts = (flat[at].to(wide) * steps.to(wide)[kind]).T
    out = torch.addmm(base.to(wide), features.to(wide), predict.to(wide))
    return out.index_add(0, order, parts @ inverse.to(wide)).to(dtype)


def analyse_reference(
    x: Tensor, base: Tensor, forward: Tensor, order: Tensor, bounds: Tensor, offsets: Tensor, steps: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """As `ops.analyse`; in float64 where `forward` is."""
    wide = torch.promote_types(forward.dtype, torch.float32)
    kind, at = places(order, bounds, offsets)
    y = ((x.to(wide) - base.to(wide)) @ forward.to(wide))[order].T * (1 / steps.to(wide))[kind]
    live = at >= 0
    v = y.round()[live]
    out = torch.zeros(size, dtype=torch.int16, device=x.device)
    out[at[live]] = torch.where(v.abs() <= 32767, v, 0).to(torch.int16)
    return out, v.abs().amax().float() if v.numel() else v.new_zeros((), dtype=torch.float32)
