"""Placing: shape checks and dispatch by device and dtype."""

import torch
from torch import Tensor

from lmcache_blend.rotary import RotarySlice, Turn
from lmcache_blend.triton_kernels.place.cpu import place_f32
from lmcache_blend.triton_kernels.place.reference import place_reference


def place(target: Tensor, source: Tensor, start: int, turn: Turn | None, piece: RotarySlice | None) -> None:
    """Write source [H, n, D] (pre-RoPE) into target [H, T, D] at position start, turned by (cos, sin) [n, R/2].

    turn or piece None: plain copy. float32 on CPU takes the fused path; every other dtype and device the torch path.
    Raises ValueError where the shapes do not fit.
    """
    heads, n, dim = source.shape
    if target.shape[0] != heads or target.shape[2] != dim or start < 0 or start + n > target.shape[1]:
        raise ValueError(f"cannot place {tuple(source.shape)} at {start} of {tuple(target.shape)}")
    if turn is None or piece is None:
        target[:, start : start + n].copy_(source)
        return
    if turn.cos.shape != (n, (piece.stop - piece.start) // 2):
        raise ValueError(f"angles of shape {tuple(turn.cos.shape)} do not fit {n} tokens of {piece}")
    if target.is_cpu and target.dtype == source.dtype == torch.float32:
        place_f32(
            target.numpy(),
            source.numpy(),
            start,
            turn.cos.numpy(),
            turn.sin.numpy(),
            piece.start,
            piece.pairing == "interleaved",
        )
    else:
        place_reference(target, source, start, turn, piece)
