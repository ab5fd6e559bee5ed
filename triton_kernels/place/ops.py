"""Placing: shape checks and dispatch by device and dtype. On a GPU a dense buffer is a cache of one large block."""

from typing import NamedTuple

import torch
from torch import Tensor

from lmcache_blend.triton_kernels.launch import on_triton
from lmcache_blend.triton_kernels.paged.cpu import scatter_f32
from lmcache_blend.triton_kernels.paged.ops import check_cache, scatter, unpack_turn
from lmcache_blend.triton_kernels.place.reference import place_reference
from lmcache_blend.triton_kernels.rotation.cpu import turn_f32
from lmcache_blend.types import RotarySlice, Turn


class Pages(NamedTuple):
    """A target in blocks: cache [blocks, H, block size, D], and the table [M] of one prompt's blocks."""

    cache: Tensor
    table: Tensor

    @property
    def device(self) -> torch.device:
        return self.cache.device


def place(target: Tensor | Pages, source: Tensor, start: int, turn: Turn | None, piece: RotarySlice | None) -> None:
    """Write source [H, n, D] (pre-RoPE) into target [H, T, D] at position start, turned by (cos, sin) [n, R/2].

    turn or piece None: plain copy. float32 on CPU takes the fused path; every other dtype there the torch path.
    Raises ValueError where the shapes do not fit, IndexError where pages end before the source.
    """
    heads, n, dim = source.shape
    if turn is not None and piece is not None and turn.cos.shape != (n, (piece.stop - piece.start) // 2):
        raise ValueError(f"angles of shape {tuple(turn.cos.shape)} do not fit {n} tokens of {piece}")
    if isinstance(target, Pages):
        check_cache(target.cache.transpose(1, 2), heads, dim, strided=True)  # addresses are written to
        _place_in_pages(target, source, start, turn, piece)
        return
    if target.shape[0] != heads or target.shape[2] != dim or start < 0 or start + n > target.shape[1]:
        raise ValueError(f"cannot place {tuple(source.shape)} at {start} of {tuple(target.shape)}")
    if on_triton(target, source):
        scatter(target.transpose(0, 1)[None], source, start=start, turn=turn, piece=piece)
    elif turn is None or piece is None:
        target[:, start : start + n].copy_(source)
    elif target.dtype == source.dtype == turn.cos.dtype == turn.sin.dtype == torch.float32 and target.stride(2) == 1:
        turning = turn.cos, turn.sin, piece.start, piece.pairing == "interleaved"
        turn_f32(target[:, start : start + n], source, *turning)
    else:
        place_reference(target, source, start, turn, piece)


def _place_in_pages(target: Pages, source: Tensor, start: int, turn: Turn | None, piece: RotarySlice | None) -> None:
    cache, table = target
    numbers = (cache, source, *(turn or ()))
    if any(x.dtype != torch.float32 for x in numbers) or on_triton(*numbers):
        scatter(cache, source, None, table, start, turn, piece, layout="HND")
        return
    scatter_f32(cache.transpose(1, 2), source, None, table, start, *unpack_turn(turn, piece))
