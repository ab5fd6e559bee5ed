"""Rotation in plain torch: any dtype, any device; float64 is computed in float64, everything else in float32."""

import torch
from torch import Tensor


def rotate_reference(
    x: Tensor, cos: Tensor, sin: Tensor, first: int = 0, interleaved: bool = False, inverse: bool = False
) -> Tensor:
    """x [..., T, D] with the dims from `first` on turned by cos, sin [T, R/2], or turned back."""
    c, s = (y.to(_wide(x)) for y in (cos, sin))
    return _turn(x, *(inverted(c, s) if inverse else (c, s)), first, interleaved)


def move_reference(
    x: Tensor,
    old_cos: Tensor,
    old_sin: Tensor,
    new_cos: Tensor,
    new_sin: Tensor,
    first: int = 0,
    interleaved: bool = False,
) -> Tensor:
    """x [..., T, D], turned by the old tables, as if it had been turned by the new ones; all tables [T, R/2]."""
    return _turn(x, *moved(*(y.to(_wide(x)) for y in (old_cos, old_sin, new_cos, new_sin))), first, interleaved)


def inverted(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables that undo cos and sin, the attention scaling within them included."""
    norm = cos * cos + sin * sin
    return cos / norm, -sin / norm


def moved(old_cos: Tensor, old_sin: Tensor, new_cos: Tensor, new_sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables that undo the old turn and do the new one; an attention scaling of both stays in the keys once."""
    norm = old_cos * old_cos + old_sin * old_sin
    return (new_cos * old_cos + new_sin * old_sin) / norm, (new_sin * old_cos - new_cos * old_sin) / norm


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _turn(x: Tensor, c: Tensor, s: Tensor, first: int, interleaved: bool) -> Tensor:
    last = first + 2 * c.shape[-1]
    part = x[..., first:last].to(_wide(x))
    if interleaved:
        a, b = part[..., ::2], part[..., 1::2]
        turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = part.chunk(2, -1)
        turned = torch.cat((a * c - b * s, b * c + a * s), -1)
    y = x.clone(memory_format=torch.contiguous_format)
    y[..., first:last] = turned.to(x.dtype)
    return y
