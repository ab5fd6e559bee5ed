"""Placing: rotate cached pre-RoPE keys to their new positions and write K and V into the KV buffer."""

from lmcache_blend.triton_kernels.place.ops import Pages, place
from lmcache_blend.triton_kernels.place.reference import place_reference

__all__ = ["Pages", "place", "place_reference"]
