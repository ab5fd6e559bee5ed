"""Linear transforms of a codec: quantised coefficients to KV and back, with a step per class of tokens."""

from lmcache_blend.triton_kernels.linear.ops import Classes, analyse, synthesise
from lmcache_blend.triton_kernels.linear.reference import analyse_reference, synthesise_reference

__all__ = ["Classes", "analyse", "analyse_reference", "synthesise", "synthesise_reference"]
