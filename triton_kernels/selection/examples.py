"""Calls that are compiled, validated and timed: the check layer of CacheBlend on 4,096 reused tokens (Llama 3)."""

import torch
from torch import Tensor

from lmcache_blend.triton_kernels.example import Example
from lmcache_blend.triton_kernels.paged.reference import gather_reference
from lmcache_blend.triton_kernels.selection import (
    paged_squared_deviation,
    squared_deviation,
    squared_deviation_reference,
    top_rows,
    top_rows_reference,
)


def _keys(device: torch.device, small: bool, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh keys as a projection gives them, the buffer, and which rows of it were computed."""
    heads, rows, tokens = (2, 21, 40) if small else (8, 3500, 4096)
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(rows, heads, dim, generator=generator).bfloat16()
    old = torch.randn(heads, tokens, dim, generator=generator).bfloat16()
    at = torch.randperm(tokens, generator=generator)[:rows].sort().values
    return new.to(device).transpose(0, 1), old.to(device), at.to(device)


def _paged(device: torch.device, small: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new, old, at = _keys(device, small, 128)
    blocks = -(-old.shape[1] // 16)
    generator = torch.Generator().manual_seed(1)
    cache = torch.randn(blocks + 3, 16, *old.shape[::2], generator=generator).bfloat16().to(device)
    return new, cache, at, torch.randperm(blocks + 3, generator=generator)[:blocks].int().to(device)


def _paged_reference(new: Tensor, cache: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    old = gather_reference(cache, positions, table)
    return squared_deviation_reference(new.double(), old.double(), torch.arange(len(positions), device=new.device))


def _scores(device: torch.device, small: bool) -> tuple[Tensor, Tensor, int]:
    tokens = 77 if small else 32768
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(tokens, generator=generator)
    candidate = torch.rand(tokens, generator=generator) < 0.9
    return scores.to(device), candidate.to(device), tokens * 3 // 20


EXAMPLES = [
    Example(
        name,
        lambda device, small, dim=dim: _keys(device, small, dim),
        squared_deviation,
        lambda new, old, rows: squared_deviation_reference(new.double(), old.double(), rows),
        tolerance=1e-5,
        rivals={"torch": squared_deviation_reference},
    )
    for name, dim in (("deviation_dim128", 128), ("deviation_dim80", 80))
] + [
    Example("deviation_paged", _paged, paged_squared_deviation, _paged_reference, tolerance=1e-5),
    Example("top_rows", _scores, top_rows, top_rows_reference, rivals={"argsort": top_rows_reference}),
]
