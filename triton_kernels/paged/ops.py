"""Paged gather and scatter: checks, dispatch.

Tokens are named by `positions` [n] under a `block_table` [M] (int32 or int64), by slots where there is no table (a slot
is block * block size + place in the block, vLLM's slot mapping), or, without positions, from `start` on. Negative ones
have no place: scatter skips them, gather gives zeros.
"""

from typing import Literal

import torch
from torch import Tensor

from lmcache_blend.triton_kernels.launch import launch, on_triton
from lmcache_blend.triton_kernels.operator import operator
from lmcache_blend.triton_kernels.paged.cpu import scatter_f32
from lmcache_blend.triton_kernels.paged.reference import gather_reference, scatter_reference
from lmcache_blend.triton_kernels.rotation.ops import blocks, check_turn, power_of_2, same_stride
from lmcache_blend.types import RotarySlice, Turn

Layout = Literal["NHD", "HND"]


def scatter(
    cache: Tensor,
    x: Tensor,
    positions: Tensor | None = None,
    block_table: Tensor | None = None,
    start: int = 0,
    turn: Turn | None = None,
    piece: RotarySlice | None = None,
    layout: Layout = "NHD",
) -> None:
    """Write x [H, n, D] to tokens of a cache [blocks, block size, H, D], or [blocks, H, block size, D] where "HND".

    turn: cos, sin [n, R/2] by which the dims of `piece` turn on the way (pre-RoPE keys). On CPU the cache
    may have any strides. Raises ValueError where shapes do not fit and, on CPU, IndexError where a position lies
    outside the cache.
    """
    _scatter(nhd(cache, layout), x, positions, block_table, start, *unpack_turn(turn, piece))


def gather(
    cache: Tensor,
    positions: Tensor | None = None,
    block_table: Tensor | None = None,
    start: int = 0,
    count: int = 0,
    turn: Turn | None = None,
    piece: RotarySlice | None = None,
    layout: Layout = "NHD",
) -> Tensor:
    """[H, n, D] of tokens of a cache, keys before RoPE where their `turn` is given; count: n where no positions are.

    Raises as `scatter`.
    """
    return _gather(nhd(cache, layout), positions, block_table, start, count, *unpack_turn(turn, piece))


def unpack_turn(turn: Turn | None, piece: RotarySlice | None) -> tuple[Tensor | None, Tensor | None, int, bool]:
    """(cos, sin, first, interleaved) for an operator; without angles where either is None."""
    if turn is None or piece is None:
        return None, None, 0, False
    if 2 * turn.cos.shape[-1] != piece.stop - piece.start:
        raise ValueError(f"angles of shape {tuple(turn.cos.shape)} do not fit {piece}")
    return turn.cos, turn.sin, piece.start, piece.pairing == "interleaved"


def nhd(cache: Tensor, layout: Layout) -> Tensor:
    if layout not in ("NHD", "HND"):
        raise ValueError(f"layout = {layout!r}: choose NHD or HND")
    return cache if layout == "NHD" else cache.transpose(1, 2)


def check_cache(cache: Tensor, heads: int, dim: int, strided: bool = False) -> None:
    """Raises ValueError unless it is [blocks, block size, heads, dim] with contiguous dims; strided: or others."""
    if cache.dim() != 4 or cache.shape[2:] != (heads, dim) or (cache.stride(3) != 1 and not strided):
        raise ValueError(
            f"a cache of shape {tuple(cache.shape)} and strides {cache.stride()} does not hold "
            f"[blocks, block size, {heads} heads, {dim} dims] with contiguous dims"
        )


def _run_scatter(
    cache: Tensor,
    x: Tensor,
    positions: Tensor | None,
    block_table: Tensor | None,
    start: int,
    cos: Tensor | None,
    sin: Tensor | None,
    first: int,
    interleaved: bool,
) -> None:
    heads, tokens, dim = x.shape
    triton = on_triton(cache, x, positions, block_table, cos, sin)
    check_cache(cache, heads, dim, strided=not triton)
    if positions is not None and positions.shape != (tokens,):
        raise ValueError(f"{tuple(positions.shape)} positions do not name {tokens} tokens")
    if cos is not None and sin is not None:
        check_turn(tokens, dim, first, cos, sin)
    tables = [t for t in (cos, sin) if t is not None]
    if not triton and cache.is_cpu and all(t.dtype == torch.float32 for t in (cache, x, *tables)):
        scatter_f32(cache, x, positions, block_table, start, cos, sin, first, interleaved)
        return
    if not triton:
        scatter_reference(cache, x, positions, block_table, start, cos, sin, first, interleaved)
        return
    from lmcache_blend.triton_kernels.paged.kernels import scatter_kernel

    x = x if x.stride(2) == 1 else x.contiguous()
    tables, options, grid = _settings(cache, tokens, cos, sin, first, interleaved)
    launch(
        scatter_kernel, grid, x, cache, positions, block_table, *tables, start, tokens, heads, *x.stride()[:2],
        cache.shape[1], *cache.stride()[:3], tables[0].stride(0), **options,
    )  # fmt: skip


def _run_gather(
    cache: Tensor,
    positions: Tensor | None,
    block_table: Tensor | None,
    start: int,
    count: int,
    cos: Tensor | None,
    sin: Tensor | None,
    first: int,
    interleaved: bool,
) -> Tensor:
    _, _, heads, dim = cache.shape
    tokens = count if positions is None else len(positions)
    check_cache(cache, heads, dim)
    if cos is not None and sin is not None:
        check_turn(tokens, dim, first, cos, sin)
    if not on_triton(cache, positions, block_table, cos, sin):
        return gather_reference(cache, positions, block_table, start, count, cos, sin, first, interleaved)
    from lmcache_blend.triton_kernels.paged.kernels import gather_kernel

    out = cache.new_empty(heads, tokens, dim)
    tables, options, grid = _settings(cache, tokens, cos, sin, first, interleaved)
    launch(
        gather_kernel, grid, cache, out, positions, block_table, *tables, start, tokens, heads, cache.shape[1],
        *cache.stride()[:3], tables[0].stride(0), **options,
    )  # fmt: skip
    return out


def _settings(
    cache: Tensor, tokens: int, cos: Tensor | None, sin: Tensor | None, first: int, interleaved: bool
) -> tuple[list[Tensor], dict[str, int], tuple[int, int]]:
    """Tables, constants and the grid of a launch; without a turn the cache stands for tables that are not read."""
    heads, dim = cache.shape[2:]
    half = 0 if cos is None else cos.shape[1]
    pairs = power_of_2(half or dim)
    block = blocks(tokens, heads, pairs)
    tables = [cache, cache] if cos is None or sin is None else same_stride(cos, sin)
    options = {"D": dim, "FIRST": first, "HALF": half, "PAIRS": pairs, "INTERLEAVED": interleaved,
               "BLOCK_T": block.tokens, "BLOCK_H": block.heads}  # fmt: skip
    return tables, options, block.grid


def _fake_gather(cache: Tensor, positions: Tensor | None, table: Tensor | None, start: int, count: int, *_: object):
    return cache.new_empty(cache.shape[2], count if positions is None else positions.shape[0], cache.shape[3])


_scatter = operator("paged_scatter", _run_scatter, lambda *_: None, mutates=("cache",))
_gather = operator("paged_gather", _run_gather, _fake_gather)
