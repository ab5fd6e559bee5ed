"""Frequency tables of an entropy coder: counts of symbols, integer frequencies, the decoder's look-up tables."""

from lmcache_blend.triton_kernels.tables.ops import frequencies, histogram, slots
from lmcache_blend.triton_kernels.tables.reference import normalise

__all__ = ["frequencies", "histogram", "normalise", "slots"]
