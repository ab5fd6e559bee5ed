"""Paged gather and scatter in plain torch: any dtype, any device."""

import torch
from torch import Tensor

from lmcache_blend.triton_kernels.rotation.reference import rotate_reference


def rows_of(
    cache: Tensor, positions: Tensor | None, block_table: Tensor | None, start: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(block, place in the block, valid) [count] of tokens in a cache [blocks, block size, H, D].

    Raises IndexError where a token lies outside the block table or the cache.
    """
    size = cache.shape[1]
    p = torch.arange(start, start + count, device=cache.device) if positions is None else positions.long()
    valid = p >= 0
    p = p.clamp_min(0)
    limit = cache.shape[0] if block_table is None else len(block_table)
    if count and int(p.max()) >= limit * size:
        raise IndexError(f"position {int(p.max())} lies outside {limit} blocks of {size} tokens")
    block = p // size
    if block_table is not None:
        block = block_table.long()[block]
        seen = block[valid]
        if len(seen) and not 0 <= int(seen.min()) <= int(seen.max()) < cache.shape[0]:
            raise IndexError(f"the block table names block {int(seen.max())} of {cache.shape[0]}")
    return block, p % size, valid


def scatter_reference(
    cache: Tensor,
    x: Tensor,
    positions: Tensor | None,
    block_table: Tensor | None = None,
    start: int = 0,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    first: int = 0,
    interleaved: bool = False,
) -> None:
    """Write x [H, n, D], turned by cos and sin [n, R/2] if given, to tokens of the cache."""
    block, inside, valid = rows_of(cache, positions, block_table, start, x.shape[1])
    if cos is not None and sin is not None:
        x = rotate_reference(x, cos, sin, first, interleaved)
    cache[block[valid], inside[valid]] = x.transpose(0, 1)[valid].to(cache.dtype)


def gather_reference(
    cache: Tensor,
    positions: Tensor | None,
    block_table: Tensor | None = None,
    start: int = 0,
    count: int = 0,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    first: int = 0,
    interleaved: bool = False,
) -> Tensor:
    """[H, n, D] tokens of the cache, turned back if cos and sin [n, R/2] are given; zeros for negative positions."""
    count = count if positions is None else len(positions)
    block, inside, valid = rows_of(cache, positions, block_table, start, count)
    x = torch.where(valid[:, None, None], cache[block, inside], 0).transpose(0, 1)
    return x.contiguous() if cos is None or sin is None else rotate_reference(x, cos, sin, first, interleaved, True)
