"""Key rotation: turn keys to their positions, back, or from one position to another."""

from lmcache_blend.triton_kernels.rotation.ops import move, rotate
from lmcache_blend.triton_kernels.rotation.reference import move_reference, rotate_reference

__all__ = ["move", "move_reference", "rotate", "rotate_reference"]
