"""Quantisation: checks, dispatch, launch settings. The format is in ../README.md."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmcache_blend.triton_kernels.launch import launch, on_triton
from lmcache_blend.triton_kernels.operator import operator
from lmcache_blend.triton_kernels.quantise import cpu
from lmcache_blend.triton_kernels.quantise.reference import (
    dequantise_reference,
    quantise_reference,
    statistics_reference,
)

Axis = Literal["token", "channel"]
Pairing = Literal["none", "half", "interleaved"]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TILE = 4096
"""Numbers of a tile: 32 a thread of 4 warps, two 128-bit loads of float16 in flight each."""


PAIR_WARPS = 2
"""Of tiles of pairs, so that a thread of a wave of 64 still has 16 bytes of nibbles."""


class Statistics(NamedTuple):
    """low, high, mean float32, one of each group."""

    low: Tensor
    high: Tensor
    mean: Tensor

    @property
    def peak(self) -> Tensor:
        """Largest magnitude."""
        return torch.maximum(self.high, -self.low)


def quantise(
    x: Tensor, axis: Axis, group: int, bits: int, symmetric: bool = False, pairing: Pairing = "none"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [H, T, D] -> codes, step, zero (None where symmetric).

    A group is `group` neighbouring dims of a token, or tokens of a channel; the last may have fewer. pairing "none": a
    byte per code of 2 to 8 bits; "half", "interleaved": 4 bits, both codes of a rotary pair in a byte, which per token
    needs a group of D or of a power of 2 that divides D / 2. Steps beyond float16 are infinite, values that are not
    finite give undefined codes. Raises ValueError where the arguments do not fit.
    """
    _check_matrix(x)
    _check_group(x.shape[2], axis, group, bits, pairing)
    q, step, zero = _quantise(x, axis == "token", group, bits, symmetric, pairing)
    return q, step, None if symmetric else zero


def dequantise(
    q: Tensor,
    step: Tensor,
    zero: Tensor | None,
    axis: Axis,
    group: int,
    bits: int,
    pairing: Pairing = "none",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What `quantise` made -> [H, T, D], q * step + zero in float32, rounded to dtype. Raises as `quantise`."""
    dims = q.shape[-1] * (1 if pairing == "none" else 2)
    _check_group(dims, axis, group, bits, pairing)
    if q.dim() != 3 or q.dtype != torch.uint8 or dtype not in FLOATS:
        raise ValueError(f"codes are {q.dtype} {tuple(q.shape)}, not [H, T, D] uint8, or {dtype} is no float")
    h, t, _ = q.shape
    want = (h, t, -(-dims // group)) if axis == "token" else (h, -(-t // group), dims)
    for name, s in (("step", step), ("zero", zero)):
        if s is not None and (s.shape != want or s.dtype != torch.float16):
            raise ValueError(f"{name} is {s.dtype} {tuple(s.shape)}, not float16 {want}")
    zero = step.new_empty(0) if zero is None else zero.contiguous()
    return _dequantise(q.contiguous(), step.contiguous(), zero, axis == "token", group, bits, pairing, dtype)


def statistics(x: Tensor, axis: Axis, group: int) -> Statistics:
    """Lowest, highest and mean value of each group of x [H, T, D], in one pass; shapes as the steps of `quantise`."""
    _check_matrix(x)
    _check_group(x.shape[2], axis, group, 8, "none")
    return Statistics(*_statistics(x, axis == "token", group))


class Tile(NamedTuple):
    """Tokens and dims of a tile; once: whether a group fits."""

    tokens: int
    dims: int
    once: bool


def tile(per_token: bool, tokens: int, dims: int, group: int) -> Tile:
    """The largest tile of at most TILE numbers whose length along groups is a power of 2."""
    if per_token:
        along = min(power_of_2(min(group, dims)), 1024)
        across = min(max(1, TILE // along), power_of_2(tokens))
        return Tile(across, along, along >= min(group, dims))
    # 64 dims of 2 bytes are a row of 128 bytes, what a warp reads best.
    across = min(64, power_of_2(dims))
    along = min(power_of_2(min(group, tokens)), max(16, TILE // across))
    return Tile(along, across, along >= min(group, tokens))


def rows_of_pairs(tokens: int, pairs: int) -> int:
    """Tokens of a tile of pairs."""
    return min(max(1, TILE // 2 // pairs), power_of_2(tokens))


def power_of_2(n: int) -> int:
    """The next one, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def _check_matrix(x: Tensor) -> None:
    if x.dim() != 3 or x.dtype not in FLOATS:
        raise ValueError(f"values are {x.dtype} {tuple(x.shape)}, not [H, T, D] float32, float16 or bfloat16")


def _check_group(dims: int, axis: Axis, group: int, bits: int, pairing: Pairing) -> None:
    if axis not in ("token", "channel") or pairing not in ("none", "half", "interleaved"):
        raise ValueError(f"axis = {axis!r}, pairing = {pairing!r}: choose token or channel; none, half or interleaved")
    if group < 1:
        raise ValueError(f"group = {group}: choose 1 or more")
    if pairing == "none":
        if not 2 <= bits <= 8:
            raise ValueError(f"bits = {bits}: choose 2 to 8")
        return
    if bits != 4 or dims % 2:
        raise ValueError(f"{bits} bits of {dims} dims cannot be paired: choose 4 bits and an even number")
    fits = group == dims or (dims // 2 % group == 0 and group & (group - 1) == 0 and group >= 2)
    if axis == "token" and not fits:
        raise ValueError(f"group = {group}: choose {dims}, or a power of 2 from 2 on that divides {dims // 2}")


def _in_rows(x: Tensor, per_token: bool, pairing: str) -> bool:
    """Whether the groups are runs of numbers in memory, one byte a code."""
    return per_token and pairing == "none" and x.is_contiguous() and x.numel() > 0


def _rowwise(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _run_quantise(
    x: Tensor, per_token: bool, group: int, bits: int, symmetric: bool, pairing: str
) -> tuple[Tensor, Tensor, Tensor]:
    if not on_triton(x):
        if _in_rows(x, per_token, pairing) and x.dtype == torch.float32:
            q, step, zero = cpu.quantise(x.reshape(-1, x.shape[2]).numpy(), group, bits, symmetric)
            shape = (*x.shape[:2], -1)
            step, zero = (torch.from_numpy(s).view(shape) if s.size else torch.from_numpy(s) for s in (step, zero))
            return torch.from_numpy(q).view(x.shape), step, zero
        return quantise_reference(x, per_token, group, bits, symmetric, pairing)
    from lmcache_blend.triton_kernels.quantise import kernels

    q, step, zero = _fake_quantise(x, per_token, group, bits, symmetric, pairing)
    x = _rowwise(x)
    (heads, tokens, dims), groups = x.shape, step.shape[2 if per_token else 1]
    top = 2 * ((1 << bits - 1) - 1) if symmetric else (1 << bits) - 1
    strides, scale = x.stride()[:2], {"TOP": top, "SYMMETRIC": symmetric}
    if pairing == "none":
        rows, columns, once = tile(per_token, tokens, dims, group)
        across = -(-tokens // rows) if per_token else -(-dims // columns)
        launch(
            kernels.quantise_groups, (across, groups, heads), x, q, step, zero, tokens, dims, *strides, group, groups,
            2 / top, **scale, AXIS=int(per_token), ONCE=once, BLOCK_T=rows, BLOCK_D=columns,
        )  # fmt: skip
        return q, step, zero
    half = dims // 2
    pairs = {"INTERLEAVED": pairing == "interleaved", "HALF": half, "PAIRS": power_of_2(half)}
    rows = rows_of_pairs(tokens if per_token else min(group, tokens), pairs["PAIRS"])
    if per_token:
        launch(
            kernels.quantise_pairs, (-(-tokens // rows), heads), x, q, step, zero, tokens, *strides, groups, 2 / top,
            **scale, **pairs, GROUP=group, BLOCK_T=rows, num_warps=PAIR_WARPS,
        )  # fmt: skip
    else:
        launch(
            kernels.quantise_pair_channels, (groups, heads), x, q, step, zero, tokens, *strides, group, groups,
            2 / top, **scale, **pairs, ONCE=rows >= min(group, tokens), BLOCK_T=rows,
            num_warps=PAIR_WARPS,
        )  # fmt: skip
    return q, step, zero


def _fake_quantise(
    x: Tensor, per_token: bool, group: int, bits: int, symmetric: bool, pairing: str
) -> tuple[Tensor, Tensor, Tensor]:
    heads, tokens, dims = x.shape
    scales = (heads, tokens, -(-dims // group)) if per_token else (heads, -(-tokens // group), dims)
    q = x.new_empty((heads, tokens, dims if pairing == "none" else dims // 2), dtype=torch.uint8)
    return q, x.new_empty(scales, dtype=torch.float16), x.new_empty(0 if symmetric else scales, dtype=torch.float16)


def _run_dequantise(
    q: Tensor, step: Tensor, zero: Tensor, per_token: bool, group: int, bits: int, pairing: str, dtype: torch.dtype
) -> Tensor:
    if not on_triton(q, step, zero):
        if _in_rows(q, per_token, pairing) and dtype == torch.float32:
            steps = step.reshape(-1, step.shape[2]).numpy().astype(np.float32)
            zeros = zero.reshape(steps.shape).numpy().astype(np.float32) if zero.numel() else None
            zeros = -steps * ((1 << bits - 1) - 1) if zeros is None else zeros
            made = cpu.dequantise(q.reshape(-1, q.shape[2]).numpy(), zeros, steps, group)
            return torch.from_numpy(made).view(q.shape)
        return dequantise_reference(q, step, zero, per_token, group, bits, pairing, dtype)
    from lmcache_blend.triton_kernels.quantise import kernels

    out = _fake_dequantise(q, step, zero, per_token, group, bits, pairing, dtype)
    (heads, tokens, dims), groups = out.shape, step.shape[2 if per_token else 1]
    scale = {"HALF_TOP": (1 << bits - 1) - 1, "SYMMETRIC": zero.numel() == 0}
    if pairing == "none":
        columns = min(power_of_2(dims), 256)
        rows = min(max(1, TILE // columns), power_of_2(tokens))
        whole = columns % group == 0 and power_of_2(group) == group if per_token else group % rows == 0
        launch(
            kernels.dequantise_groups, (-(-tokens // rows), -(-dims // columns), heads), q, step, zero, out, tokens,
            dims, group, groups, **scale, AXIS=int(per_token), SPREAD=group if whole else 0, BLOCK_T=rows,
            BLOCK_D=columns,
        )  # fmt: skip
        return out
    half = dims // 2
    pairs = {"INTERLEAVED": pairing == "interleaved", "HALF": half, "PAIRS": power_of_2(half)}
    rows = rows_of_pairs(tokens, pairs["PAIRS"])
    grid = (-(-tokens // rows), heads)
    if per_token:
        launch(
            kernels.dequantise_pairs, grid, q, step, zero, out, tokens, groups, **scale, **pairs, GROUP=group,
            BLOCK_T=rows, num_warps=PAIR_WARPS,
        )  # fmt: skip
    else:
        launch(
            kernels.dequantise_pair_channels, grid, q, step, zero, out, tokens, group, groups, **scale, **pairs,
            ONE=group % rows == 0, BLOCK_T=rows, num_warps=PAIR_WARPS,
        )  # fmt: skip
    return out


def _fake_dequantise(
    q: Tensor, step: Tensor, zero: Tensor, per_token: bool, group: int, bits: int, pairing: str, dtype: torch.dtype
) -> Tensor:
    return q.new_empty((*q.shape[:2], q.shape[2] * (1 if pairing == "none" else 2)), dtype=dtype)


def _run_statistics(x: Tensor, per_token: bool, group: int) -> tuple[Tensor, Tensor, Tensor]:
    if not on_triton(x):
        return statistics_reference(x, per_token, group)
    from lmcache_blend.triton_kernels.quantise import kernels

    out = _fake_statistics(x, per_token, group)
    x = _rowwise(x)
    (heads, tokens, dims), groups = x.shape, out[0].shape[2 if per_token else 1]
    rows, columns, _ = tile(per_token, tokens, dims, group)
    across = -(-tokens // rows) if per_token else -(-dims // columns)
    launch(
        kernels.group_statistics, (across, groups, heads), x, *out, tokens, dims, *x.stride()[:2], group, groups,
        AXIS=int(per_token), BLOCK_T=rows, BLOCK_D=columns,
    )  # fmt: skip
    return out


def _fake_statistics(x: Tensor, per_token: bool, group: int) -> tuple[Tensor, Tensor, Tensor]:
    heads, tokens, dims = x.shape
    scales = (heads, tokens, -(-dims // group)) if per_token else (heads, -(-tokens // group), dims)
    low = x.new_empty(scales, dtype=torch.float32)
    return low, torch.empty_like(low), torch.empty_like(low)


_quantise = operator("quantise", _run_quantise, _fake_quantise)
_dequantise = operator("dequantise", _run_dequantise, _fake_dequantise)
_statistics = operator("statistics", _run_statistics, _fake_statistics)
