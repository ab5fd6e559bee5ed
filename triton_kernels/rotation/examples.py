"""Calls that are compiled, validated and timed: keys of 8 heads, 128 dims (Llama 3), and a partial rotary (Phi)."""

from functools import partial

import torch
from torch import Tensor

from lmcache_blend.triton_kernels.example import Example
from lmcache_blend.triton_kernels.rotation import move, move_reference, rotate, rotate_reference

HEADS = 8


def tables(device: torch.device, tokens: int, half: int, seed: int = 0, scale: float = 1.2) -> tuple[Tensor, Tensor]:
    """cos and sin [T, R/2] of random positions, with an attention scaling."""
    positions = torch.randint(0, 8192, (tokens, 1), generator=torch.Generator().manual_seed(seed))
    angle = positions * torch.logspace(0, -4, half)
    return (scale * angle.cos()).to(device), (scale * angle.sin()).to(device)


def keys(device: torch.device, small: bool, dim: int) -> Tensor:
    shape = (2, 37, dim) if small else (HEADS, 2048, dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)


def _turn(dim: int, half: int, device: torch.device, small: bool) -> tuple[Tensor, Tensor, Tensor]:
    x = keys(device, small, dim)
    return x, *tables(device, x.shape[1], half)


def _move(dim: int, half: int, device: torch.device, small: bool) -> tuple[Tensor, ...]:
    x = keys(device, small, dim)
    return x, *tables(device, x.shape[1], half), *tables(device, x.shape[1], half, 2)


def _wide(reference, options: dict):
    return lambda *args: reference(*(a.double() for a in args), **options)


def _example(name: str, make, run, reference, options: dict) -> Example:
    return Example(
        name, make, partial(run, **options), _wide(reference, options), tolerance=4e-3, streaming=("rotate_kernel",),
        rivals={"torch": partial(reference, **options)},
    )  # fmt: skip


EXAMPLES = [
    _example("rotate_neox", partial(_turn, 128, 64), rotate, rotate_reference, {}),
    _example("rotate_gptj", partial(_turn, 128, 64), rotate, rotate_reference, {"interleaved": True}),
    _example("rotate_partial", partial(_turn, 80, 16), rotate, rotate_reference, {}),
    _example("unrotate_neox", partial(_turn, 128, 64), rotate, rotate_reference, {"inverse": True}),
    _example("move_neox", partial(_move, 128, 64), move, move_reference, {}),
    _example("move_gptj", partial(_move, 128, 64), move, move_reference, {"interleaved": True}),
]
