"""Quantisation in plain torch: also the CPU path, since every kernel must give its bits."""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped(x: Tensor, per_token: bool, group: int) -> Tensor:
    """x [H, T, D] -> [H, T, G, group] or, per channel, [H, G, group, D]; the last group repeats its last value."""
    length = x.shape[2 if per_token else 1]
    missing = -length % group
    if missing and length:
        last = x[:, :, -1:].expand(-1, -1, missing) if per_token else x[:, -1:].expand(-1, missing, -1)
        x = torch.cat((x, last), 2 if per_token else 1)
    return x.unflatten(2 if per_token else 1, (-1, group))


def spread(s: Tensor, shape: torch.Size, per_token: bool, group: int) -> Tensor:
    """Of a value per group, [H, T, G] or [H, G, D], the one of each element, [H, T, D]."""
    axis = 2 if per_token else 1
    return s.repeat_interleave(group, axis).narrow(axis, 0, shape[axis])


def statistics_reference(x: Tensor, per_token: bool, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(lowest, highest, mean) of each group, float32 (float64 for float64)."""
    wide = x if x.dtype == torch.float64 else x.float()
    g, axis = grouped(wide, per_token, group), 3 if per_token else 2
    axis_length, length = (2, x.shape[2]) if per_token else (1, x.shape[1])
    counts = torch.full((g.shape[2 if per_token else 1],), group, device=x.device)
    if length % group:
        counts[-1] = length % group
    total = F.pad(wide, (0, -x.shape[2] % group) if per_token else (0, 0, 0, -x.shape[1] % group))
    total = total.unflatten(axis_length, (-1, group)).sum(axis)
    return g.amin(axis), g.amax(axis), total / (counts if per_token else counts[:, None])


def quantise_reference(
    x: Tensor, per_token: bool, group: int, bits: int, symmetric: bool, pairing: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.quantise`; zero is empty where symmetric."""
    top = 2 * ((1 << bits - 1) - 1) if symmetric else (1 << bits) - 1
    g, axis = grouped(x.float(), per_token, group), 3 if per_token else 2
    # A tensor divides: a python number would be multiplied by its reciprocal on some devices.
    divisor = torch.full((), top, dtype=torch.float32, device=x.device)
    if symmetric:
        step = (g.abs().amax(axis) * torch.full_like(divisor, 2 / top)).half()
        zero, zeros = step.new_empty(0), -step.float() * (top // 2)
    else:
        low = g.amin(axis)
        zero, step = low.half(), ((g.amax(axis) - low) / divisor).half()
        zeros = zero.float()
    steps = step.float()
    safe = torch.where(steps > 0, steps, float("inf"))
    parts = [spread(s, x.shape, per_token, group) for s in (zeros, safe)]
    q = ((x.float() - parts[0]) / parts[1]).round().clamp(0, top).to(torch.uint8)
    return pack(q, pairing), step, zero


def dequantise_reference(
    q: Tensor, step: Tensor, zero: Tensor, per_token: bool, group: int, bits: int, pairing: str, dtype: torch.dtype
) -> Tensor:
    """As `ops.dequantise`; in float64 for that dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    codes = unpack(q, pairing)
    steps = step.to(wide)
    zeros = zero.to(wide) if zero.numel() else -steps * ((1 << bits - 1) - 1)
    s, z = (spread(v, codes.shape, per_token, group) for v in (steps, zeros))
    return (codes.to(wide) * s + z).to(dtype)


def pack(q: Tensor, pairing: str) -> Tensor:
    """Codes of rotary pairs in one byte, the first in the low nibble; as they are for "none"."""
    if pairing == "none":
        return q
    a, b = q.chunk(2, -1) if pairing == "half" else (q[..., ::2], q[..., 1::2])
    return a | b << 4


def unpack(q: Tensor, pairing: str) -> Tensor:
    """What `pack` packed."""
    if pairing == "none":
        return q
    a, b = q & 15, q >> 4
    return torch.cat((a, b), -1) if pairing == "half" else torch.stack((a, b), -1).flatten(-2)
