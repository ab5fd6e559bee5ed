"""Paged KV: tokens into and out of the blocks of a serving engine, keys turned on the way."""

from lmcache_blend.triton_kernels.paged.ops import gather, scatter
from lmcache_blend.triton_kernels.paged.reference import gather_reference, scatter_reference

__all__ = ["gather", "gather_reference", "scatter", "scatter_reference"]
