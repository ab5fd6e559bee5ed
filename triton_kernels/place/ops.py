"""Placing: shape checks and dispatch by device and dtype. On a GPU a dense buffer is a cache of one large block."""

import torch
from torch import Tensor

from lmcache_blend.triton_kernels.launch import on_triton
from lmcache_blend.triton_kernels.paged.ops import scatter
from lmcache_blend.triton_kernels.place.reference import place_reference
from lmcache_blend.triton_kernels.rotation.cpu import turn_f32
from lmcache_blend.types import RotarySlice, Turn


def place(target: Tensor, source: Tensor, start: int, turn: Turn | None, piece: RotarySlice | None) -> None:
    """Write source [H, n, D] (pre-RoPE) into target [H, T, D] at position start, turned by (cos, sin) [n, R/2].

    turn or piece None: plain copy. float32 on CPU takes the fused path; every other dtype there the torch path.
    Raises ValueError where the shapes do not fit.
    """
    heads, n, dim = source.shape
    if target.shape[0] != heads or target.shape[2] != dim or start < 0 or start + n > target.shape[1]:
        raise ValueError(f"cannot place {tuple(source.shape)} at {start} of {tuple(target.shape)}")
    if turn is not None and piece is not None and turn.cos.shape != (n, (piece.stop - piece.start) // 2):
        raise ValueError(f"angles of shape {tuple(turn.cos.shape)} do not fit {n} tokens of {piece}")
    if on_triton(target, source):
        scatter(target.transpose(0, 1)[None], source, start=start, turn=turn, piece=piece)
    elif turn is None or piece is None:
        target[:, start : start + n].copy_(source)
    elif target.dtype == source.dtype == torch.float32:
        turn_f32(
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
