"""Attention of chosen rows over all keys under an exact mask by position."""

from lmcache_blend.triton_kernels.attention.ops import (
    attention_mass,
    row_attention,
    row_attention_mass,
    selective_attention,
    selective_attention_lse,
)
from lmcache_blend.triton_kernels.attention.reference import row_attention_reference, selective_attention_reference

__all__ = [
    "attention_mass",
    "row_attention",
    "row_attention_mass",
    "row_attention_reference",
    "selective_attention",
    "selective_attention_lse",
    "selective_attention_reference",
]
