"""Quantised chunks into and out of a paged cache, in one pass: dequantise, turn, scatter; gather, turn back, quantise.

The format is that of `../README.md`, "Quantised KV". Tokens are named as in ops.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lmcache_blend.triton_kernels.launch import launch, on_triton
from lmcache_blend.triton_kernels.operator import operator
from lmcache_blend.triton_kernels.paged.ops import Layout, check_cache, nhd, unpack_turn
from lmcache_blend.triton_kernels.paged.reference import gather_reference, scatter_reference
from lmcache_blend.triton_kernels.quantise.reference import dequantise_reference, quantise_reference
from lmcache_blend.triton_kernels.rotation.ops import check_turn, power_of_2, same_stride
from lmcache_blend.types import RotarySlice, Turn

TILE = 4096
"""Pairs of a tile: 16 a thread of four waves of 64, so that codes of 4 bits, too, move 128 bits at a time there."""


class Quantised(NamedTuple):
    """Codes [H, T, D] or [H, T, D / 2] of 8 or 4 bits; float16 steps, zeros (None where symmetric) of their groups."""

    codes: Tensor
    steps: Tensor
    zeros: Tensor | None


def scatter_quantised(
    cache: Tensor,
    data: Quantised,
    per_token: bool,
    group: int,
    positions: Tensor | None = None,
    block_table: Tensor | None = None,
    start: int = 0,
    turn: Turn | None = None,
    piece: RotarySlice | None = None,
    layout: Layout = "NHD",
) -> None:
    """Dequantise, turn as `piece` says, write to tokens of the cache; nothing in between is in memory.

    per_token: a step for `group` neighbouring dims of a token, else for `group` neighbouring tokens of a dim. piece:
    its pairing is that of the codes' bytes, also where turn is None; without it they pair i and i + D/2.
    Raises ValueError where shapes do not fit, and on CPU IndexError where a position lies outside the cache.
    """
    cos, sin, first, _ = unpack_turn(turn, piece)
    interleaved = piece is not None and piece.pairing == "interleaved"
    _scatter(nhd(cache, layout), *data, per_token, group, positions, block_table, start, cos, sin, first, interleaved)


def gather_quantised(
    cache: Tensor,
    bits: int,
    per_token: bool,
    group: int,
    symmetric: bool = False,
    positions: Tensor | None = None,
    block_table: Tensor | None = None,
    start: int = 0,
    count: int = 0,
    turn: Turn | None = None,
    piece: RotarySlice | None = None,
    layout: Layout = "NHD",
) -> Quantised:
    """The reverse of `scatter_quantised`: tokens of a cache, keys before RoPE where their turn is given, quantised.

    group: per token the head dim, or a power of two that divides half of it; per channel any number of tokens.
    """
    cos, sin, first, _ = unpack_turn(turn, piece)
    interleaved = piece is not None and piece.pairing == "interleaved"
    codes, steps, zeros = _gather(
        nhd(cache, layout), bits, per_token, group, symmetric, positions, block_table, start, count, cos, sin, first,
        interleaved,
    )  # fmt: skip
    return Quantised(codes, steps, None if symmetric else zeros)


def step_shape(heads: int, tokens: int, dim: int, per_token: bool, group: int) -> tuple[int, int, int]:
    """Of steps and zeros; raises ValueError for a group that does not fit."""
    if group < 1 or (per_token and group != dim and (dim // 2 % group or group & (group - 1) or group < 2)):
        raise ValueError(
            f"group = {group}: per token take {dim} (the head dim) or a power of two that divides half of it, "
            "per channel a number of tokens"
        )
    return (heads, tokens, dim // group) if per_token else (heads, -(-tokens // group), dim)


def tokens_of_tile(pairs: int, tokens: int, turn: int) -> int:
    """Of `tokens` at most; a quarter where only some dims turn (2), which takes twice the loads and their addresses."""
    return max(1, min(TILE // (4 if turn == 2 else 1) // pairs, power_of_2(tokens)))


def _run_scatter(
    cache: Tensor,
    codes: Tensor,
    steps: Tensor,
    zeros: Tensor | None,
    per_token: bool,
    group: int,
    positions: Tensor | None,
    block_table: Tensor | None,
    start: int,
    cos: Tensor | None,
    sin: Tensor | None,
    first: int,
    interleaved: bool,
) -> None:
    heads, tokens, width = codes.shape
    dim = cache.shape[3]
    check_cache(cache, heads, dim)
    want = step_shape(heads, tokens, dim, per_token, group)
    if codes.dtype != torch.uint8 or width not in (dim, dim // 2) or dim % 2:
        raise ValueError(f"codes {tuple(codes.shape)} {codes.dtype} are neither 8 nor 4 bits of {dim} dims")
    for y in (steps, zeros):
        if y is not None and (y.shape != want or y.dtype != torch.float16):
            raise ValueError(f"steps or zeros {tuple(y.shape)} {y.dtype}: float16 of shape {want} is needed")
    if positions is not None and positions.shape != (tokens,):
        raise ValueError(f"{tuple(positions.shape)} positions do not name {tokens} tokens")
    _check_pairs(tokens, dim, cos, sin, first, interleaved)
    if not on_triton(cache, codes, steps, zeros, positions, block_table, cos, sin):
        bits = 8 * width // dim
        zero = steps.new_empty(0) if zeros is None else zeros
        pairing = pairing_of(bits, interleaved)
        x = dequantise_reference(codes, steps, zero, per_token, group, bits, pairing, torch.float32)
        scatter_reference(cache, x, positions, block_table, start, cos, sin, first, interleaved)
        return
    from lmcache_blend.triton_kernels.paged.load_kernels import scatter_quantised_kernel

    tables, turn, half = _tables(cache, cos, sin)
    pairs = power_of_2(dim // 2)
    block = tokens_of_tile(pairs, tokens, turn)
    of_tokens, of_dims = (1, group) if per_token else (group, 1)
    launch(
        scatter_quantised_kernel, (-(-tokens // block), heads), codes.contiguous(), steps.contiguous(),
        None if zeros is None else zeros.contiguous(), cache, positions, block_table, *tables, start, tokens, want[1],
        cache.shape[1], *cache.stride()[:3], tables[0].stride(0), D=dim, P=pairs, FIRST=first, HALF=half, TURN=turn,
        BITS=8 * width // dim, GT=of_tokens, GD=of_dims, SHARED=of_tokens % block == 0 or of_tokens >= tokens,
        INTERLEAVED=interleaved, SYMMETRIC=zeros is None, BLOCK_T=block,
    )  # fmt: skip


def _run_gather(
    cache: Tensor,
    bits: int,
    per_token: bool,
    group: int,
    symmetric: bool,
    positions: Tensor | None,
    block_table: Tensor | None,
    start: int,
    count: int,
    cos: Tensor | None,
    sin: Tensor | None,
    first: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, dim = cache.shape[2:]
    tokens = count if positions is None else len(positions)
    check_cache(cache, heads, dim)
    if bits not in (4, 8) or dim % 2:
        raise ValueError(f"bits = {bits}: choose 4 or 8, of an even number of dims")
    shape = step_shape(heads, tokens, dim, per_token, group)
    _check_pairs(tokens, dim, cos, sin, first, interleaved)
    if not on_triton(cache, positions, block_table, cos, sin):
        x = gather_reference(cache.float(), positions, block_table, start, count, cos, sin, first, interleaved)
        return quantise_reference(x, per_token, group, bits, symmetric, pairing_of(bits, interleaved))
    from lmcache_blend.triton_kernels.paged import store_kernels

    codes, steps, zeros = _fake_gather(cache, bits, per_token, group, symmetric, positions, block_table, start, count)
    tables, turn, half = _tables(cache, cos, sin)
    if per_token:
        kernel, pairs = store_kernels.gather_quantised_tokens_kernel, power_of_2(dim // 2)
    else:  # the largest power of two that divides the pairs, and few enough of them to fill the device
        kernel, pairs = store_kernels.gather_quantised_channels_kernel, min(32, dim // 2 & -(dim // 2))
    block = tokens_of_tile(pairs, tokens if per_token else min(group, tokens), turn)
    grid = (-(-tokens // block), heads) if per_token else (shape[1], heads, dim // 2 // pairs)
    launch(
        kernel, grid, cache, codes, steps, None if symmetric else zeros, positions, block_table, *tables,
        2.0 / ((1 << bits) - 2), start, tokens, cache.shape[1], *cache.stride()[:3], tables[0].stride(0), D=dim,
        P=pairs, FIRST=first, HALF=half, TURN=turn, BITS=bits, GROUP=group, INTERLEAVED=interleaved,
        SYMMETRIC=symmetric, BLOCK_T=block,
    )  # fmt: skip
    return codes, steps, zeros


def pairing_of(bits: int, interleaved: bool) -> str:
    return "none" if bits == 8 else "interleaved" if interleaved else "half"


def _check_pairs(tokens: int, dim: int, cos: Tensor | None, sin: Tensor | None, first: int, interleaved: bool) -> None:
    if cos is not None and sin is not None:
        check_turn(tokens, dim, first, cos, sin)
        if interleaved and first % 2:
            raise ValueError(f"pairs that begin at dim {first} do not fill the bytes of 4-bit codes")


def _tables(cache: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[list[Tensor], int, int]:
    """Tables, how much turns (the kernels' NONE, WHOLE, PARTIAL), pairs that do."""
    if cos is None or sin is None:
        return [cache, cache], 0, 0
    half = cos.shape[1]
    return same_stride(cos, sin), 1 if 2 * half == cache.shape[3] else 2, half


def _fake_gather(
    cache: Tensor,
    bits: int,
    per_token: bool,
    group: int,
    symmetric: bool,
    positions: Tensor | None,
    block_table: Tensor | None,
    start: int,
    count: int,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, dim = cache.shape[2:]
    tokens = count if positions is None else positions.shape[0]
    shape = step_shape(heads, tokens, dim, per_token, group)
    return (
        cache.new_empty(heads, tokens, dim * bits // 8, dtype=torch.uint8),
        cache.new_empty(shape, dtype=torch.float16),
        cache.new_empty((0,) if symmetric else shape, dtype=torch.float16),
    )


_scatter = operator("paged_scatter_quantised", _run_scatter, lambda *_: None, mutates=("cache",))
_gather = operator("paged_gather_quantised", _run_gather, _fake_gather)
