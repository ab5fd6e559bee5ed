"""Placing in plain torch: any dtype, any device."""

from torch import Tensor

from lmcache_blend.rotary import RotarySlice, Turn, rotate


def place_reference(target: Tensor, source: Tensor, start: int, turn: Turn | None, piece: RotarySlice | None) -> None:
    """Write source [H, n, D] (pre-RoPE) into target [H, T, D] at start, turned by (cos, sin) [n, R/2] if given."""
    turned = source if turn is None or piece is None else rotate(source, turn, piece)
    target[:, start : start + source.shape[1]].copy_(turned)
