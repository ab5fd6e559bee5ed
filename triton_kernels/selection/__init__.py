"""Choosing rows: how far reused K and V deviate from what is computed in their place, and the tokens with most."""

from lmcache_blend.triton_kernels.selection.ops import paged_squared_deviation, squared_deviation, top_rows
from lmcache_blend.triton_kernels.selection.reference import squared_deviation_reference, top_rows_reference

__all__ = [
    "paged_squared_deviation",
    "squared_deviation",
    "squared_deviation_reference",
    "top_rows",
    "top_rows_reference",
]
