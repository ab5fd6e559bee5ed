"""Uniform quantisation of KV, per token or per channel in groups, in bytes or in nibbles of rotary pairs."""

from lmcache_blend.triton_kernels.quantise.ops import Statistics, dequantise, quantise, statistics
from lmcache_blend.triton_kernels.quantise.reference import dequantise_reference, quantise_reference

__all__ = [
    "Statistics",
    "dequantise",
    "dequantise_reference",
    "quantise",
    "quantise_reference",
    "statistics",
]
