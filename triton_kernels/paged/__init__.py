"""Paged KV: tokens into and out of the blocks of a serving engine, keys turned and codes made on the way."""

from lmcache_blend.triton_kernels.paged.ops import gather, scatter
from lmcache_blend.triton_kernels.paged.quantised import Quantised, gather_quantised, scatter_quantised
from lmcache_blend.triton_kernels.paged.reference import gather_reference, scatter_reference

__all__ = [
    "Quantised",
    "gather",
    "gather_quantised",
    "gather_reference",
    "scatter",
    "scatter_quantised",
    "scatter_reference",
]
