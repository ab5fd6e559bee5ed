"""Transforms: checks, dispatch, launch settings."""

from typing import NamedTuple

import torch
from torch import Tensor

from lmcache_blend.triton_kernels.launch import launch, on_triton
from lmcache_blend.triton_kernels.linear.reference import analyse_reference, synthesise_reference
from lmcache_blend.triton_kernels.operator import operator


class Classes(NamedTuple):
    """Where symbols stand (codecs.adaptive.Layout), all int64 but the steps.

    order [T]: tokens sorted by class. bounds [C + 1] into it. offsets [R, C]: start of each block of symbols, -1 where
    nothing is coded. steps [C] float32.
    """

    order: Tensor
    bounds: Tensor
    offsets: Tensor
    steps: Tensor


def synthesise(
    symbols: Tensor,
    where: Classes,
    inverse: Tensor,
    base: Tensor,
    features: Tensor,
    predict: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Symbols [N] int16 -> KV [T, D] = base + features @ predict + (symbols * steps) @ inverse.

    inverse [R, D] and predict [F, D] float16, bfloat16 or float32 (the dtype of the product), base [D] float32,
    features [T, F] of any float, F may be 0. Raises ValueError where shapes do not fit.
    """
    tokens, ranks = _check(where, inverse)
    if inverse.shape[0] != ranks or base.shape != inverse.shape[1:]:
        raise ValueError(f"inverse {tuple(inverse.shape)} and base {tuple(base.shape)} for {ranks} coefficients")
    if features.shape != (tokens, predict.shape[0]) or predict.shape[1:] != base.shape:
        raise ValueError(f"features {tuple(features.shape)} and predict {tuple(predict.shape)} for {tokens} tokens")
    if symbols.dtype != torch.int16 or predict.dtype != inverse.dtype:
        raise ValueError(f"symbols are {symbols.dtype}, predict {predict.dtype} beside {inverse.dtype}")
    tensors = (x.contiguous() for x in (inverse, base, features, predict))
    return _synthesise(symbols, *where, *tensors, dtype)


def analyse(x: Tensor, base: Tensor, forward: Tensor, where: Classes, size: int) -> tuple[Tensor, Tensor]:
    """KV x [T, D] less what is foretold of it, base [T, D] float32 -> symbols [size] int16, zeros where none belong.

    forward [D, R]. Also returns the largest magnitude of a symbol: 32,767 or more does not fit (0 is stored for it).
    Raises ValueError where shapes do not fit.
    """
    tokens, ranks = _check(where, forward)
    if forward.shape[1] != ranks or x.shape != (tokens, forward.shape[0]) or base.shape != x.shape:
        raise ValueError(
            f"x {tuple(x.shape)}, base {tuple(base.shape)}, forward {tuple(forward.shape)} for {tokens} tokens, "
            f"{ranks} coefficients"
        )
    return _analyse(x.contiguous(), base.contiguous(), forward.contiguous(), *where, size)


class Tile(NamedTuple):
    """Tokens, columns of the result, terms of a step of the sum; warps and stages."""

    tokens: int
    columns: int
    terms: int
    warps: int
    stages: int


def tile(tokens: int, columns: int, bits: int) -> Tile:
    """Of a product of 16-bit or 32-bit matrices: gathers of symbols leave no room for more than two stages."""
    return Tile(min(64, power_of_2(tokens)), columns, 64 if bits == 16 else 32, 4, 2)


def power_of_2(n: int) -> int:
    """The next one, at least 16, what a tensor core takes."""
    return max(16, 1 << max(n - 1, 0).bit_length())


def _check(where: Classes, matrix: Tensor) -> tuple[int, int]:
    """(T, R); raises ValueError."""
    if matrix.dim() != 2 or matrix.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"the matrix is {matrix.dtype} {tuple(matrix.shape)}, not 2-dimensional float")
    (tokens,), (ranks, classes) = where.order.shape, where.offsets.shape
    if where.bounds.shape != (classes + 1,) or where.steps.shape != (classes,):
        raise ValueError(f"bounds {tuple(where.bounds.shape)}, steps {tuple(where.steps.shape)} for {classes} classes")
    return tokens, ranks


def _run_synthesise(
    symbols: Tensor, order: Tensor, bounds: Tensor, offsets: Tensor, steps: Tensor, inverse: Tensor, base: Tensor,
    features: Tensor, predict: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if not on_triton(symbols, order, offsets, inverse, base, features):
        return synthesise_reference(symbols, order, bounds, offsets, steps, inverse, base, features, predict, dtype)
    from lmcache_blend.triton_kernels.linear import kernels

    (ranks, dims), (tokens, count) = inverse.shape, features.shape
    out = torch.empty((tokens, dims), dtype=dtype, device=symbols.device)
    t = tile(tokens, 128 if inverse.element_size() == 2 else 64, 8 * inverse.element_size())
    launch(
        kernels.synthesise_tile, (-(-tokens // t.tokens), -(-dims // t.columns)), symbols, order, bounds, offsets,
        steps, inverse, base, features, predict, out, tokens, dims, ranks, count, CLASSES=offsets.shape[1],
        BLOCK_T=t.tokens, BLOCK_D=t.columns, BLOCK_R=t.terms, BLOCK_F=min(t.terms, power_of_2(count)),
        PRECISION="ieee", num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return out


def _fake_synthesise(
    symbols: Tensor, order: Tensor, bounds: Tensor, offsets: Tensor, steps: Tensor, inverse: Tensor, base: Tensor,
    features: Tensor, predict: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return symbols.new_empty((features.shape[0], inverse.shape[1]), dtype=dtype)


def _run_analyse(
    x: Tensor, base: Tensor, forward: Tensor, order: Tensor, bounds: Tensor, offsets: Tensor, steps: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    if not on_triton(x, base, forward, order, offsets):
        return analyse_reference(x, base, forward, order, bounds, offsets, steps, size)
    from lmcache_blend.triton_kernels.linear import kernels

    (tokens, dims), ranks = x.shape, forward.shape[1]
    t = tile(tokens, 64, 8 * forward.element_size())
    grid = (-(-tokens // t.tokens), -(-ranks // t.columns))
    # Between rows of symbols lie gaps that the coder expects to be 0.
    out = torch.zeros(size, dtype=torch.int16, device=x.device)
    largest = torch.zeros(grid, dtype=torch.float32, device=x.device)
    launch(
        kernels.analyse_tile, grid, x, base, forward, order, bounds, offsets, steps, out, largest, tokens, dims,
        ranks, CLASSES=offsets.shape[1], BLOCK_T=t.tokens, BLOCK_D=t.terms, BLOCK_R=t.columns, PRECISION="ieee",
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return out, largest.amax() if largest.numel() else largest.sum()


def _fake_analyse(
    x: Tensor, base: Tensor, forward: Tensor, order: Tensor, bounds: Tensor, offsets: Tensor, steps: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(size, dtype=torch.int16), x.new_empty((), dtype=torch.float32)


_synthesise = operator("synthesise", _run_synthesise, _fake_synthesise)
_analyse = operator("analyse", _run_analyse, _fake_analyse)
