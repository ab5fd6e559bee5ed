"""Deviation and top-k: checks, dispatch, launch settings."""

import numpy as np
import torch
from torch import Tensor

from lmcache_blend.triton_kernels.launch import launch, on_triton
from lmcache_blend.triton_kernels.operator import operator
from lmcache_blend.triton_kernels.paged.ops import Layout, check_cache, nhd
from lmcache_blend.triton_kernels.paged.reference import gather_reference
from lmcache_blend.triton_kernels.rotation.ops import power_of_2
from lmcache_blend.triton_kernels.selection.cpu import squared_deviation_f32
from lmcache_blend.triton_kernels.selection.reference import squared_deviation_reference, top_rows_reference

TILE = 2048  # numbers of a tile, 16 a thread
TOP_BLOCK = 4096


def squared_deviation(new: Tensor, old: Tensor, rows: Tensor) -> Tensor:
    """How far fresh K or V lie from the reused ones: [2, N] float32, sums of (new - old)^2 and of new^2.

    new [H, N, D]; old: the buffer [H, T, D], at rows [N]; the sums go over heads and dims (HKVD, arXiv 2405.16444).
    Raises ValueError where the shapes do not fit.
    """
    return _deviation(new, old.transpose(0, 1)[None], rows, None)


def paged_squared_deviation(
    new: Tensor, cache: Tensor, positions: Tensor, block_table: Tensor | None = None, layout: Layout = "NHD"
) -> Tensor:
    """`squared_deviation` from tokens of a paged cache, named as in `paged.gather`; 0 for negative positions."""
    return _deviation(new, nhd(cache, layout), positions, block_table)


def top_rows(scores: Tensor, candidate: Tensor, count: int) -> Tensor:
    """Ascending positions [count] of the candidates [T] bool with the highest scores [T]; of equal ones the first.

    NaN counts as the highest. count: at most the number of candidates, which on a GPU is not checked.
    """
    return _top(scores, candidate, count)


def tokens_of_tile(dim: int) -> int:
    return max(1, TILE // power_of_2(dim))


def _run_deviation(new: Tensor, cache: Tensor, positions: Tensor, block_table: Tensor | None) -> Tensor:
    heads, tokens, dim = new.shape
    check_cache(cache, heads, dim)
    if positions.shape != (tokens,):
        raise ValueError(f"{tuple(positions.shape)} positions do not name {tokens} tokens")
    if on_triton(new, cache, positions, block_table):
        from lmcache_blend.triton_kernels.selection.kernels import deviation_kernel

        new = new if new.stride(2) == 1 else new.contiguous()
        out, block = new.new_empty(2, tokens, dtype=torch.float32), tokens_of_tile(dim)
        launch(
            deviation_kernel, (-(-tokens // block),), new, cache, positions, block_table, out, tokens, heads,
            *new.stride()[:2], cache.shape[1], *cache.stride()[:3], D=dim, PD=power_of_2(dim), BLOCK_T=block,
        )  # fmt: skip
        return out
    dense = block_table is None and len(cache) == 1 and (not tokens or int(positions.min()) >= 0)
    if not dense or (tokens and int(positions.max()) >= cache.shape[1]):
        old, rows = gather_reference(cache, positions, block_table), torch.arange(tokens)
        return squared_deviation_reference(new, old, rows).float().masked_fill(positions < 0, 0.0)
    old = cache[0].transpose(0, 1)
    if not new.dtype == old.dtype == torch.float32 or new.stride(2) != 1:
        return squared_deviation_reference(new, old, positions).float()
    out = new.new_empty(2, tokens)
    squared_deviation_f32(
        *_memory(new), *_memory(old), positions.numpy(), heads, dim, out.numpy()
    )  # fmt: skip
    return out


def _memory(x: Tensor) -> tuple[np.ndarray, tuple[int, int]]:
    """What [H, N, D] lies in, from its first number on, and its strides along H and N."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((length if x.numel() else 0,), (1,)).numpy(), (x.stride(0), x.stride(1))


def _run_top(scores: Tensor, candidate: Tensor, count: int) -> Tensor:
    if scores.dim() != 1 or candidate.shape != scores.shape or candidate.dtype != torch.bool:
        raise ValueError(f"candidates {tuple(candidate.shape)} {candidate.dtype} for scores {tuple(scores.shape)}")
    if not 0 <= count <= len(scores):
        raise ValueError(f"{count} rows of {len(scores)}")
    if not on_triton(scores, candidate):
        return _top_on_cpu(scores, candidate, count)
    from lmcache_blend.triton_kernels.selection.kernels import top_rows_kernel

    out = torch.empty(count, dtype=torch.int64, device=scores.device)
    if count:
        block = min(TOP_BLOCK, max(256, power_of_2(len(scores))))
        launch(
            top_rows_kernel, (1,), scores.contiguous(), candidate.contiguous(), out, len(scores), count, BLOCK=block,
            num_warps=8,
        )  # fmt: skip
    return out


def _top_on_cpu(scores: Tensor, candidate: Tensor, count: int) -> Tensor:
    """One sort of all tokens, unless candidates of score -inf have to be told from what is no candidate."""
    masked = torch.where(candidate, scores.float(), -torch.inf)
    order = masked.argsort(descending=True, stable=True)[:count]
    if count and float(masked[order[-1]]) == -torch.inf:
        return top_rows_reference(scores, candidate, count)
    return order.sort().values


_deviation = operator(
    "squared_deviation", _run_deviation, lambda new, *_: new.new_empty(2, new.shape[1], dtype=torch.float32)
)
_top = operator("top_rows", _run_top, lambda scores, candidate, count: scores.new_empty(count, dtype=torch.int64))
