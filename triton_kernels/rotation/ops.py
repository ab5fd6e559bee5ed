"""Rotation: checks, dispatch, launch settings."""

from typing import NamedTuple

import torch
from torch import Tensor

from lmcache_blend.triton_kernels.launch import launch, on_triton
from lmcache_blend.triton_kernels.operator import LIBRARY, operator
from lmcache_blend.triton_kernels.rotation.cpu import turn_f32
from lmcache_blend.triton_kernels.rotation.reference import inverted, move_reference, moved, rotate_reference

PROGRAMS = 512  # enough for two or more on each multiprocessor of the GPUs in targets.py
TILE = 2048  # numbers in a tile of one side of the pairs, 16 a thread


class Blocks(NamedTuple):
    """Tokens and heads of a program; programs along each axis."""

    tokens: int
    heads: int
    grid: tuple[int, int]


def blocks(tokens: int, heads: int, pairs: int) -> Blocks:
    """Full tiles, and as many heads a program (they share the tables) as leave PROGRAMS of them."""
    block = max(1, min(TILE // pairs, power_of_2(tokens)))
    along = -(-tokens // block)
    share = max(1, min(heads, along * heads // PROGRAMS))
    return Blocks(block, share, (along, -(-heads // share)))


def power_of_2(n: int) -> int:
    """The next one, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, first: int = 0, interleaved: bool = False, inverse: bool = False
) -> Tensor:
    """Turn dims first..first+R of x [..., T, D] by cos, sin [T, R/2], or back, in float32; a contiguous copy.

    interleaved: pair dims 2i and 2i + 1 (gptj), not i and i + R/2 (neox). inverse: undoes what the same tables did,
    divided by cos^2 + sin^2, the square of an attention scaling within them. Differentiable in x.
    Raises ValueError where the shapes do not fit.
    """
    return _rotate(x, cos, sin, first, interleaved, inverse)


def move(
    x: Tensor,
    old_cos: Tensor,
    old_sin: Tensor,
    new_cos: Tensor,
    new_sin: Tensor,
    first: int = 0,
    interleaved: bool = False,
) -> Tensor:
    """Keys x [..., T, D] at their old positions -> at new ones, in one pass; tables [T, R/2]. Else as `rotate`."""
    return _move(x, old_cos, old_sin, new_cos, new_sin, first, interleaved)


def check_turn(tokens: int, dim: int, first: int, *tables: Tensor) -> None:
    """Raises ValueError unless all tables are [tokens, R/2] of one dtype and stride, and first..first+R within dim."""
    want = (tokens, tables[0].shape[-1])
    for table in tables:
        if table.shape != want:
            raise ValueError(f"angles of shape {tuple(table.shape)} do not fit {want[0]} tokens and {want[1]} pairs")
    if first < 0 or want[1] < 1 or first + 2 * want[1] > dim:
        raise ValueError(f"dims {first} to {first + 2 * want[1]} cannot turn in rows of {dim}")


def same_stride(*tables: Tensor) -> list[Tensor]:
    """The tables, contiguous unless they share one stride along tokens and are contiguous along pairs."""
    if all(t.stride(1) == 1 and t.stride(0) == tables[0].stride(0) for t in tables):
        return list(tables)
    return [t.contiguous() for t in tables]


def _run_rotate(
    x: Tensor, cos: Tensor, sin: Tensor, first: int = 0, interleaved: bool = False, inverse: bool = False
) -> Tensor:
    check_turn(x.shape[-2], x.shape[-1], first, cos, sin)
    if on_triton(x, cos, sin):
        from lmcache_blend.triton_kernels.rotation.kernels import FORWARD, INVERSE

        return _launch(x, cos, sin, cos, sin, first, interleaved, INVERSE if inverse else FORWARD)
    if x.dtype == cos.dtype == sin.dtype == torch.float32:
        return _on_cpu(x, *(inverted(cos, sin) if inverse else (cos, sin)), first, interleaved)
    return rotate_reference(x, cos, sin, first, interleaved, inverse)


def _run_move(
    x: Tensor,
    old_cos: Tensor,
    old_sin: Tensor,
    new_cos: Tensor,
    new_sin: Tensor,
    first: int = 0,
    interleaved: bool = False,
) -> Tensor:
    tables = (old_cos, old_sin, new_cos, new_sin)
    check_turn(x.shape[-2], x.shape[-1], first, *tables)
    if on_triton(x, *tables):
        from lmcache_blend.triton_kernels.rotation.kernels import MOVE

        return _launch(x, new_cos, new_sin, old_cos, old_sin, first, interleaved, MOVE)
    if all(t.dtype == torch.float32 for t in (x, *tables)):
        return _on_cpu(x, *moved(*tables), first, interleaved)
    return move_reference(x, *tables, first, interleaved)


def _on_cpu(x: Tensor, cos: Tensor, sin: Tensor, first: int, interleaved: bool) -> Tensor:
    source = x.detach().reshape(-1, *x.shape[-2:])
    out = source.new_empty(source.shape)
    turn_f32(out, source, cos, sin, first, interleaved)
    return out.view(x.shape)


def _launch(
    x: Tensor, cos: Tensor, sin: Tensor, old_cos: Tensor, old_sin: Tensor, first: int, interleaved: bool, mode: int
) -> Tensor:
    from lmcache_blend.triton_kernels.rotation.kernels import rotate_kernel

    source = x.reshape(-1, *x.shape[-2:])
    if source.stride(2) != 1:
        source = source.contiguous()
    heads, tokens, dim = source.shape
    out = source.new_empty(source.shape)
    cos, sin, old_cos, old_sin = same_stride(cos, sin, old_cos, old_sin)
    half = cos.shape[1]
    block = blocks(tokens, heads, power_of_2(half))
    launch(
        rotate_kernel, block.grid, source, out, cos, sin, old_cos, old_sin, tokens, heads, *source.stride()[:2],
        cos.stride(0), D=dim, FIRST=first, HALF=half, PAIRS=power_of_2(half), INTERLEAVED=interleaved, MODE=mode,
        BLOCK_T=block.tokens, BLOCK_H=block.heads,
    )  # fmt: skip
    return out.view(x.shape)


def _fake(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.options = inputs[3:]  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
    first, interleaved, inverse = ctx.options  # type: ignore[attr-defined]
    if inverse:
        cos, sin = inverted(cos, sin)
    return rotate(grad, cos, -sin, first, interleaved), None, None, None, None, None


_rotate = operator("rotate", _run_rotate, _fake)
torch.library.register_autograd("lmcache_blend::rotate", _backward, setup_context=_keep, lib=LIBRARY)
_move = operator("move", _run_move, _fake)
