"""Attention of chosen rows over all keys under an exact mask by position."""

from lmcache_blend.triton_kernels.attention.ops import attention_weights, row_attention
from lmcache_blend.triton_kernels.attention.reference import row_attention_reference

__all__ = ["attention_weights", "row_attention", "row_attention_reference"]
