"""Placing in plain torch: any dtype, any device."""

from torch import Tensor

from lmcache_blend.triton_kernels.rotation.reference import rotate_reference
from lmcache_blend.types import RotarySlice, Turn


def place_reference(target: Tensor, source: Tensor, start: int, turn: Turn | None, piece: RotarySlice | None) -> None:
    """Write source [H, n, D] (pre-RoPE) into target [H, T, D] at start, turned by (cos, sin) [n, R/2] if given."""
    if turn is not None and piece is not None:
        source = rotate_reference(source, turn.cos, turn.sin, piece.start, piece.pairing == "interleaved")
    target[:, start : start + source.shape[1]].copy_(source)
